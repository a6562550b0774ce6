"""A routed linear layer: ways of adding two adapters to the rows that take them, by the shape of the batch.

python -m benchmarks.routed_linear [--repeat 15] [--quick] [--device cuda --dtype bfloat16] [--json FILE]

Times are of the base layer and both adapters, over those of the base layer alone; for training forward and backward.
`package` is what the package does. The others: `slices`, one run of rows an adapter, added by the product itself;
`gather`, rows by index, and added by index; `copies`, the same with a new tensor for each sum; `masked`, ranks joined
to one matrix, and a mask over them; `all rows`, each adapter on all rows, and `where`; `grouped_mm`, rows in order and
a product for each group. Rows lie in order of their adapters, or in turn; `slices` and `grouped_mm` then sort first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import measure
from benchmarks.shapes import Shapes

CASES = {"decode": (12, 1), "prefill": (12, 160), "training": (8, 160)}
NAMES = ("speech", "vision")
SCALING = 2.0


@dataclass
class Case:
    """A layer, a batch and who takes what.

    Attributes:
        x: `[rows, length, in]`; ids: `[rows]`, -1 for the base.
        pairs: `down` `[r, in]` and `up` `[out, r]` of each adapter.
        order: rows sorted by id, and `back`, its inverse; `ends` of the groups, in tokens.
    """

    layer: Any
    x: Any
    ids: Any
    pairs: list[tuple[Any, Any]]

    def __post_init__(self) -> None:
        import torch

        self.order = self.ids.argsort(stable=True)
        self.back = self.order.argsort()
        self.sorted = bool((self.order == torch.arange(len(self.ids), device=self.ids.device)).all())
        self.rows = [(self.ids == i).nonzero().squeeze(1) for i in range(len(self.pairs))]
        counts = [(self.ids == i).sum().item() for i in range(-1, len(self.pairs))]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.runs = [slice(starts[i + 1], starts[i + 2]) for i in range(len(self.pairs))]
        ends = [stop * self.x.shape[1] for stop in starts[1:]]
        self.ends = torch.tensor(ends, dtype=torch.int32, device=self.x.device)
        ranks = [len(down) for down, _ in self.pairs]
        self.down = torch.cat([down for down, _ in self.pairs]).detach().requires_grad_()
        self.up = torch.cat([up for _, up in self.pairs], 1).detach().requires_grad_()
        mask = torch.cat([(self.ids == i)[:, None].expand(-1, rank) for i, rank in enumerate(ranks)], 1)
        self.mask = (SCALING * mask).to(self.x.dtype)[:, None]
        most = max(ranks)
        pad = torch.nn.functional.pad
        downs = [pad(down, (0, 0, 0, most - len(down))).t() for down, _ in self.pairs]
        ups = [pad(up, (0, most - up.shape[1])).t() for _, up in self.pairs]
        nothing = (torch.zeros_like(downs[0]), torch.zeros_like(ups[0]))
        self.downs = torch.stack([nothing[0], *downs]).detach().requires_grad_()  # [groups, in, r]
        self.ups = torch.stack([nothing[1], *ups]).detach().requires_grad_()  # [groups, r, out]


def build(shapes: Shapes, rows: int, length: int, in_order: bool, device: str, dtype: str) -> Case:
    """The gate and up projection of a decoder layer: the largest."""
    import torch

    from mixlora.modeling.routed_lora import RoutedLinear

    torch.manual_seed(0)
    layer = RoutedLinear(torch.nn.Linear(shapes.width, 2 * shapes.inner, bias=False))
    layer.base_layer.requires_grad_(False)
    ranks = dict(shapes.ranks)
    for name in NAMES:
        layer.add_adapter(name, ranks[name], SCALING * ranks[name])
        torch.nn.init.normal_(layer.lora_B[name].weight, std=0.02)
    layer = layer.to(device, getattr(torch, dtype))
    x = torch.randn(rows, length, shapes.width, device=device, dtype=getattr(torch, dtype))
    ids = torch.arange(rows, device=device) % 3 - 1
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in NAMES]
    return Case(layer, x, ids.sort().values if in_order else ids, pairs)


def ways_of(case: Case) -> dict[str, Callable[[Any], Any]]:
    """All ways, each from `x` to the layer's output."""
    import torch
    from torch.nn.functional import linear

    from mixlora.modeling.routed_lora import Route

    weight, pairs = case.layer.base_layer.weight, case.pairs
    route = Route.from_adapter_ids(case.ids, list(NAMES), length=case.x.shape[1])

    def slices(x: Any) -> Any:
        x = x if case.sorted else x[case.order]
        out = linear(x, weight)
        for run, (down, up) in zip(case.runs, pairs, strict=True):
            out[run].flatten(0, 1).addmm_(linear(x[run], down).flatten(0, 1), up.t(), alpha=SCALING)
        return out if case.sorted else out[case.back]

    def gather(x: Any) -> Any:
        out = linear(x, weight)
        for rows, (down, up) in zip(case.rows, pairs, strict=True):
            out.index_add_(0, rows, linear(linear(x.index_select(0, rows), down), up), alpha=SCALING)
        return out

    def copies(x: Any) -> Any:
        out = linear(x, weight)
        for rows, (down, up) in zip(case.rows, pairs, strict=True):
            out = out.index_add(0, rows, linear(linear(x.index_select(0, rows), down), up) * SCALING)
        return out

    def masked(x: Any) -> Any:
        hidden = linear(x, case.down) * case.mask
        return linear(x, weight).flatten(0, 1).addmm_(hidden.flatten(0, 1), case.up.t()).view(*x.shape[:2], -1)

    def all_rows(x: Any) -> Any:
        out = linear(x, weight)
        for i, (down, up) in enumerate(pairs):
            out = torch.where((case.ids == i)[:, None, None], out + linear(linear(x, down), up) * SCALING, out)
        return out

    def grouped(x: Any) -> Any:
        x = x if case.sorted else x[case.order]
        flat = x.flatten(0, 1)
        hidden = torch.nn.functional.grouped_mm(flat, case.downs, offs=case.ends)
        delta = torch.nn.functional.grouped_mm(hidden, case.ups, offs=case.ends)
        out = torch.add(linear(x, weight), delta.view(*x.shape[:2], -1), alpha=SCALING)
        return out if case.sorted else out[case.back]

    return {
        "package": lambda x: case.layer(x, route),
        "slices": slices,
        "gather": gather,
        "copies": copies,
        "masked": masked,
        "all rows": all_rows,
        "grouped_mm": grouped,
    }


def measured(case: Case, training: bool, args: Any) -> dict[str, float]:
    """Each way's time over the base layer's; NaN for what this PyTorch or device does not offer."""
    import torch

    ways: dict[str, Callable[[], Any]] = {}
    wanted = None
    base = case.layer.base_layer
    for name, way in {"base": base, **ways_of(case)}.items():

        def run(way: Callable[[Any], Any] = way) -> Any:
            if not training:
                with torch.no_grad():
                    return way(case.x)
            x = case.x.detach().requires_grad_()
            out = way(x)
            out.backward(out.detach())
            return x.grad

        try:
            found = run()
        except RuntimeError:
            if name == "package":
                raise
            continue
        if name == "package":
            wanted = found
        elif name != "base":
            apart = (found - wanted).abs().max() / wanted.std()
            if apart > (1e-3 if args.dtype == "float32" else 0.3):
                raise RuntimeError(f"{name} gives something else: {apart:.3g} standard deviations apart")
        ways[name] = run
    times = measure.alternate(ways, args.repeat, args.device)
    return {name: measure.ratio(times, name, "base") for name in times if name != "base"}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a table: a row for each shape, a column for each way."""
    args, shapes = measure.parse(measure.options(__doc__, repeat=15), argv)
    found: dict[str, dict[str, float]] = {}
    for name, (rows, length) in CASES.items():
        for in_order in (True, False):
            case = build(shapes, rows, 2 if args.quick and length > 1 else length, in_order, args.device, args.dtype)
            found[f"{name}, {'in order' if in_order else 'in turn'}"] = measured(case, name == "training", args)
    columns = list(dict.fromkeys(way for each in found.values() for way in each))
    rows_shown = [(name, *(each.get(way, float("nan")) for way in columns)) for name, each in found.items()]
    print("time over that of the base layer alone")
    print(measure.table(("", *columns), rows_shown))
    return measure.finish("routed_linear", args, {"of_base": found})


if __name__ == "__main__":
    main()
