"""What a picture shows by name, given to the decoder as its own tokens."""

import math

import pytest
import torch

from mixlora.modeling.media_encoding import Told
from mixlora.modeling.vision_names import UNNAMED, VisionNames
from tests.modeling.model_fixtures import IMAGE, PAD, batch_inputs, row_inputs, tiny_model

SIZES = {"count": 4, "longest": 3, "hidden_size": 5, "dropout": 0.0}
NAMES = [[11], [12, 13], [14, 15, 16]]


def named_part(**changes: float) -> VisionNames:
    torch.manual_seed(0)
    part = VisionNames(6, **SIZES | changes)
    part.learn_names(NAMES)
    return part


def test_a_picture_is_given_likely_names_or_none() -> None:
    part, features = named_part(), torch.randn(3, 4, 6)
    assert part.known == 3 and part(features).shape == (3, 1 + 3)
    with torch.no_grad():
        part.head.weight.zero_()
        part.head.bias.copy_(torch.tensor([1.0, 0.0, 2.0, -1.0, 9.0]))  # the last has no name yet
        chances = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1).tolist()
        for names in part.likely_names(part(features)):
            assert [name for name, _ in names] == [(12, 13), (), (11,), (14, 15, 16)]
            assert [chance for _, chance in names] == pytest.approx(chances)


def test_kinds_are_not_among_things(monkeypatch) -> None:
    part, features = named_part(), torch.randn(1, 4, 6)
    part.learn_names(NAMES, kinds=[[12, 13]])
    logits = torch.tensor([[1.0, 0.0, 9.0, -1.0]])
    [names] = part.likely_names(logits)
    assert [name for name, _ in names] == [(), (11,), (14, 15, 16)]
    assert sum(math.exp(score) for _, score in names) == pytest.approx(1)
    monkeypatch.setattr(part, "at_places", lambda features: logits[:, None].expand(-1, 4, -1))
    things = part.things_at(features)
    assert things[0, 0].tolist() == [0, *things[0, 0, 1:2].tolist(), 0, *things[0, 0, 3:].tolist()]
    assert part(features).shape == (1, 4)  # learning knows them
    part.learn_names(NAMES)
    assert part.likely_names(logits)[0][0][0] == (12, 13)
    with pytest.raises(ValueError, match=r"vision_names: kinds \[\[12\]\] are not among the names"):
        part.learn_names(NAMES, kinds=[[12], [11]])


def test_several_things_are_seen_each_at_its_place(monkeypatch) -> None:
    part = named_part()
    logits = torch.zeros(2, 4, 4)  # [pictures, places, classes]
    logits[:, :, 0] = 6  # nothing is there
    logits[0, 1] = torch.tensor([0.0, 0.0, 2.0, 1.0])
    logits[0, 3] = torch.tensor([0.0, 3.0, 0.0, 0.0])
    monkeypatch.setattr(part, "at_places", lambda features: logits)
    several, none = part.seen_names(part.things_at(torch.randn(2, 4, 6)))
    assert [name for name, _ in several] == [(12, 13), (11,)] and none == []  # the third is rather nowhere
    chances = logits[0].softmax(-1)
    for (_, score), number in zip(several, (2, 1), strict=True):
        assert math.exp(score) == pytest.approx(
            1 - math.prod(1 - float(each) for each in chances[:, number]), abs=1e-5
        )
    logits[0, :, 3] = 5  # a third at each of four places
    assert (14, 15, 16) in [name for name, _ in part.seen_names(part.things_at(torch.randn(2, 4, 6)))[0]]


def test_what_is_seen_comes_in_the_order_of_its_places(monkeypatch) -> None:
    part = named_part()
    monkeypatch.setattr(part, "at_places", lambda features: logits)
    for at, order in (
        ((0, 4, 8), [(11,), (12, 13), (14, 15, 16)]),  # places of 3 rows and 3 columns
        ((8, 4, 0), [(14, 15, 16), (12, 13), (11,)]),
        ((5, 3, 4), [(12, 13), (14, 15, 16), (11,)]),  # side by side
        ((1, 7, 4), [(11,), (14, 15, 16), (12, 13)]),  # one above the other
    ):
        logits = torch.zeros(1, 9, 4)
        logits[..., 0] = 9
        for number, (place, likelihood) in enumerate(zip(at, (20.0, 30.0, 25.0), strict=True), 1):
            logits[0, place, number] = likelihood
        assert [name for name, _ in part.seen_names(part.things_at(torch.randn(1, 9, 6)))[0]] == order


def test_another_name_of_the_same_thing_is_not_seen_beside_it(monkeypatch) -> None:
    part = named_part()
    logits = torch.zeros(1, 4, 4)
    logits[..., 1:] = torch.tensor([2.0, 1.8, -2.0])  # the second is as good as the first, but nowhere better
    monkeypatch.setattr(part, "at_places", lambda features: logits)
    assert [name for name, _ in part.seen_names(part.things_at(torch.randn(1, 4, 6)))[0]] == [(11,)]
    logits[0, 2, 2] = 2.5  # here it is
    assert {name for name, _ in part.seen_names(part.things_at(torch.randn(1, 4, 6)))[0]} == {(11,), (12, 13)}


def test_places_are_told_by_what_is_there_alone() -> None:
    part, features = named_part(), torch.randn(2, 4, 6)
    places = part.at_places(features)
    assert places.shape == (2, 4, 1 + 3)
    torch.testing.assert_close(part.at_places(features[:1, 2:3]), places[:1, 2:3])
    torch.testing.assert_close(part(features[:1, 2:3]), places[:1, 2])  # of one place the whole is that place


def test_dropout_acts_in_training_alone() -> None:
    part, features = named_part(dropout=0.5), torch.randn(2, 4, 6)
    assert torch.equal(part.eval()(features), part(features))
    assert not torch.equal(part.train()(features), part(features))


def test_it_looks_where_there_is_something() -> None:
    part = named_part()
    with torch.no_grad():
        part.places.weight.copy_(100 * torch.eye(6)[:1])
        one, other = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
        one[:, 2, 0] = other[:, 2, 0] = 20  # what stands out
        other[:, 2] = one[:, 2]
        torch.testing.assert_close(part(one), part(other))
        other[:, 2, 1] += 3
        assert not torch.allclose(part(one), part(other), atol=1e-3)


def test_answers_that_are_names_have_classes() -> None:
    answers = [torch.tensor(ids, dtype=torch.long) for ids in ([12, 13], [12], [11], [])]
    assert named_part().classes_of(answers).tolist() == [2, UNNAMED, 1, UNNAMED]


def test_a_list_must_fit() -> None:
    for names in ([[1]] * 2, [[1], [2, 3, 4, 5]], [[1], []], [[i] for i in range(5)]):
        with pytest.raises(ValueError, match="vision_names: (a name is given twice|[0-9]+ names of up to)"):
            named_part().learn_names(names)
    part = named_part()
    part.learn_names([[3]])
    assert part.known == 1 and part.names[0].tolist() == [3, -1, -1]


@torch.no_grad()
def test_the_name_stands_behind_a_picture_as_embeddings(tmp_path) -> None:
    model = tiny_model(vision_names=SIZES)
    row = row_inputs("image")
    row["ids"][2:2] = [IMAGE] * 3
    row = batch_inputs([row])
    table = model.get_input_embeddings().weight
    fresh = model.model.get_image_features(row["pixel_values"]).pooler_output[0]
    assert fresh.shape == (7, 32) and torch.equal(fresh[4:], table[[PAD] * 3])
    part = model.model.vision_names
    part.learn_names(NAMES)
    part.head.bias[2] = 50
    told = model.model.get_image_features(row["pixel_values"]).pooler_output[0]
    assert torch.equal(told[:4], fresh[:4]) and torch.equal(told[4:], table[[PAD, 12, 13]])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.vision_names == SIZES and again.model.vision_names.known == 3
    assert torch.equal(again(**row).logits, model(**row).logits)


@torch.no_grad()
def test_names_come_before_what_is_written() -> None:
    reading = {"widths": [4], "layers": [1], "patch_size": 2, "tokens": 2}
    model = tiny_model(vision_names=SIZES, vision_letters=reading)
    assert model.model.picture_tokens == 4 + 3 + 2
    model.model.vision_names.learn_names(NAMES)
    model.model.vision_names.head.bias[1] = 50
    pixels = row_inputs("image")["pixels"]
    told = model.model.told(pixels, model.model.encode_vision(pixels))
    assert model.model.told_ids(told).tolist() == [[PAD, PAD, 11, PAD, PAD]]


def test_names_of_several_things_share_the_room() -> None:
    model = tiny_model(vision_names=SIZES | {"longest": 6})
    named = [((11,), -0.1), ((), -3.0)]
    for seen, ids in (
        ([], [PAD, PAD, PAD, PAD, PAD, 11]),
        ([((12, 13), -0.1), ((11,), -0.2)], [PAD, PAD, 12, 13, PAD, 11]),
        ([((14, 15, 16), -0.1), ((12, 13), -0.2), ((11,), -0.2)], [14, 15, 16, PAD, 12, 13]),
    ):
        assert model.model.told_ids([Told(names=named, seen=seen)]).tolist() == [ids]


def test_one_thing_is_not_several() -> None:
    model = tiny_model(vision_names=SIZES)
    model.model.vision_names.learn_names(NAMES)
    pixels = row_inputs("image")["pixels"]
    features = model.model.encode_vision(pixels)
    two = [((11,), -0.1), ((12, 13), -0.3)]
    for likeliest, seen, kept in ((0.4, [], 0), (0.4, two[:1], 0), (0.4, two, 2), (0.6, two, 0)):
        names = [((11,), math.log(likeliest)), ((), math.log(1 - likeliest))]
        model.model.vision_names.seen_names = lambda _, seen=seen: [seen]
        model.model.vision_names.likely_names = lambda _, names=names: [names]
        [told] = model.model.told(pixels, features)
        assert len(told.seen) == kept and told.names == names
        assert told.whole.shape == told.somewhere.shape == (4,)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="vision_names: unknown names, expected some of count"):
        tiny_model(vision_names={"names": 2})
    with pytest.raises(ValueError, match="vision_names: count must be an integer of at least 1, got 0"):
        tiny_model(vision_names={"count": 0})
    with pytest.raises(ValueError, match="vision_names: dropout must be from 0 to below 1, got 1"):
        tiny_model(vision_names={"dropout": 1})
