"""Objectives on small literal tensors."""

import pytest
import torch

from mixlora.training.objectives import ctc_loss, letter_ctc_loss, line_ctc_loss, next_token_loss, place_loss


def test_loss_is_normalised_by_the_tokens_of_the_step() -> None:
    logits, targets = torch.randn(2, 3, 11), torch.tensor([[5, 6, -100], [-100, -100, 7]])
    log_probabilities = logits.log_softmax(-1)
    expected = -(log_probabilities[0, 0, 5] + log_probabilities[0, 1, 6] + log_probabilities[1, 2, 7])
    torch.testing.assert_close(next_token_loss(logits, targets), expected / 3)
    torch.testing.assert_close(next_token_loss(logits, targets, 12), expected / 12)


def test_no_target_gives_zero_and_no_gradient() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.full((1, 2), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        next_token_loss(torch.randn(1, 2, 5), torch.zeros(1, 3, dtype=torch.long))


def test_ctc_is_the_probability_of_all_ways_to_hear_the_text() -> None:
    """Two frames hear one token as itself twice, or beside a blank."""
    embeddings, clip = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
    p = (3 * clip @ embeddings.T).softmax(-1)
    ways = p[0, 2] * p[1, 2] + p[0, 0] * p[1, 2] + p[0, 2] * p[1, 0]
    loss = ctc_loss([clip], torch.tensor([[-100, 2, 4]]), embeddings, blank=0, end=4, sharpness=3)
    torch.testing.assert_close(loss, -ways.log())


def test_ctc_is_a_mean_over_tokens_and_clips_do_not_touch() -> None:
    embeddings = torch.randn(6, 3)
    clips = [torch.randn(9, 3), torch.randn(4, 3)]
    labels = torch.tensor([[1, 2, 3, 5], [2, 5, -100, -100]])
    alone = [ctc_loss([clip], row[None], embeddings, blank=0, end=5) for clip, row in zip(clips, labels, strict=True)]
    both = ctc_loss(clips, labels, embeddings, blank=0, end=5)
    torch.testing.assert_close(both, (3 * alone[0] + alone[1]) / 4)


def test_shares_of_ctc_add_up_and_a_row_without_labels_has_none() -> None:
    embeddings = torch.randn(6, 3)
    clips = [torch.randn(9, 3), torch.randn(4, 3)]
    labels = torch.tensor([[1, 2, 3, 5], [2, 5, -100, -100]])
    whole = ctc_loss(clips, labels, embeddings, blank=0, end=5)
    idle = torch.full_like(labels[:1], -100)
    shares = [
        ctc_loss([clip, clip], torch.cat([row[None], idle]), embeddings, blank=0, end=5, num_items=torch.tensor(4))
        for clip, row in zip(clips, labels, strict=True)
    ]
    torch.testing.assert_close(sum(shares), whole)


def test_letters_weigh_a_token_as_much_as_tokens_do() -> None:
    """The sum over the letters of a row, and a share of what all rows say in tokens."""
    heard = [torch.randn(9, 4).log_softmax(-1), torch.randn(5, 4).log_softmax(-1)]
    labels = torch.tensor([[1, 2, 3, 5], [2, 5, -100, -100], [-100] * 4])
    spellings = {1: [1, 2], 2: [3], 3: []}

    def spell(ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([letter for token in ids.tolist() for letter in spellings[token]], dtype=torch.long)

    wanted = [
        torch.nn.functional.ctc_loss(clip, torch.tensor(letters), [len(clip)], [len(letters)], reduction="sum")
        for clip, letters in zip(heard, ([1, 2, 3], [3]), strict=True)
    ]
    loss = letter_ctc_loss([*heard, heard[0]], labels, spell, end=5, num_items=4)
    torch.testing.assert_close(loss, sum(wanted) / 4)


def test_a_clip_shorter_than_its_text_teaches_nothing() -> None:
    clip = torch.randn(2, 3, requires_grad=True)
    ctc_loss([clip], torch.tensor([[1, 1, 2]]), torch.randn(6, 3), blank=0, end=5).backward()
    assert clip.grad is not None and not clip.grad.any()


def test_ctc_wants_a_clip_in_every_row() -> None:
    with pytest.raises(ValueError, match="1 clips in 2 rows"):
        ctc_loss([torch.randn(3, 4)], torch.ones(2, 2, dtype=torch.long), torch.randn(6, 4), blank=0, end=5)


def test_lines_of_a_picture_are_read_each_by_itself() -> None:
    """A row's sum over its lines, empty ones too; a row without labels teaches nothing."""
    read = torch.randn(3, 2, 7, 4).log_softmax(-1)
    labels = torch.tensor([[1, 9, 2, 5], [2, 5, -100, -100], [-100] * 4])  # 9 breaks a line

    def lines_of(ids: torch.Tensor) -> list[torch.Tensor]:
        whole = ids.tolist()
        cut = whole.index(9) if 9 in whole else len(whole)
        return [torch.tensor(line, dtype=torch.long) for line in (whole[:cut], whole[cut + 1 :])]

    wanted = [
        torch.nn.functional.ctc_loss(read[row, line], torch.tensor(text), [7], [len(text)], reduction="sum")
        for row, line, text in ((0, 0, [1]), (0, 1, [2]), (1, 0, [2]))
    ] + [-read[1, 1, :, 0].sum()]
    loss = line_ctc_loss(read, labels, lines_of, end=5, num_items=4)
    torch.testing.assert_close(loss, sum(wanted) / 4)
    with pytest.raises(ValueError, match="one picture in every row, got 2 pictures in 3 rows"):
        line_ctc_loss(read[:2], labels, lines_of, end=5, num_items=4)


def test_each_thing_is_seen_somewhere_and_nothing_else_anywhere() -> None:
    logits = torch.randn(3, 4, 5, requires_grad=True)
    classes = [torch.tensor([2, 4]), torch.tensor([0]), torch.tensor([1])]  # of the second picture nothing is known
    chances = logits.softmax(-1)
    wanted = 0.0
    for picture, things in zip(chances, ([2, 4], [], [1]), strict=True):
        wanted -= picture[:, [0, *things]].sum(-1).log().mean()
        for thing in things:
            wanted -= (1 - (1 - picture[:, thing]).prod()).log()
    torch.testing.assert_close(place_loss(logits, classes), wanted)
    assert place_loss(logits[:0], []) == 0


def test_places_that_are_sure_have_gradients() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1] = 60  # surely there; the other thing surely not
    logits.requires_grad_()
    loss = place_loss(logits, [torch.tensor([1, 2])])
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad[0, 1, 2] < 0
