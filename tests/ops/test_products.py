"""The products of a block against its modules, and the kernels against the plain form.

The kernels run on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``.
"""

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lepton.model.block import MLP
from lepton.model.layers import Linear, norm
from lepton.ops import products as module
from lepton.ops.products import MOST_ROWS, PRODUCTS, Added, plain_products, products
from lepton.presets import SIZES
from tests.ops.devices import DEVICES, GPU, force

FORMS = {
    "query, key, value": ([40, 24, 12], {"normed": True}),
    "key, value": ([24, 24], {"normed": True}),
    "out": ([40], {"residual": True}),
    "out, with the norm of a residual": ([40], {"residual": True, "residual_normed": True}),
    "up": ([72], {"normed": True, "squared_relu": True}),
    "up, with rows of a table": ([72], {"added": True, "squared_relu": True}),
    "none of it": ([33], {}),
}
"""What a block needs: numbers of outputs, and options."""
TILES = [(32, 16, 32, 1, 4, 2), (16, 32, 16, 4, 4, 2), (16, 8, 16, 2, 2, 2)]


def half(device):
    """The interpreter does not round to bf16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def draw(form, rows, depth, device="cpu", dtype=torch.float32):
    """Inputs of different sizes, so that their norm matters, matrices, and options."""
    counts, options = FORMS[form]
    x = (torch.randn(rows, depth) * torch.linspace(0.2, 4, rows)[:, None]).to(device, dtype)
    weights = [(torch.randn(count, depth) / depth**0.5).to(device, dtype) for count in counts]
    residual = torch.randn(rows, counts[0]).to(device, dtype) if options.get("residual") else None
    added = None
    if options.get("added"):
        table = torch.randn(5, counts[0]).to(device, dtype)
        added = Added(table, torch.randint(0, 5, (rows,), device=device))
    return x, weights, {**options, "residual": residual, "added": added}


def doubled(x, weights, options):
    residual, added = options["residual"], options["added"]
    options = {**options, "residual": None if residual is None else residual.double()}
    options["added"] = None if added is None else added._replace(table=added.table.double())
    return plain_products(x.double(), [weight.double() for weight in weights], **options)


def assert_near(found, expected, tolerance):
    """Each row within `tolerance` of its size."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert ((one.double() - other).norm(dim=1) <= tolerance * other.norm(dim=1)).all()


def compare(device, form, rows, depth, dtype=torch.bfloat16):
    tolerance = 1e-5 if device == "cpu" else 1e-2
    x, weights, options = draw(form, rows, depth, device, torch.float32 if device == "cpu" else dtype)
    found = products(x, weights, **options)
    assert all(y.dtype == x.dtype for y in found)
    assert_near(found, doubled(x, weights, options), tolerance)


def test_a_block_is_made_of_them():
    x, q, k, mlp = torch.randn(7, 36), Linear(36, 40), Linear(36, 20), MLP(36, 44)
    for weight in (q.weight, k.weight, *mlp.parameters()):
        torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        found = products(x, [q.weight, k.weight], normed=True)
        assert all(torch.equal(y, linear(norm(x))) for y, linear in zip(found, (q, k), strict=True))
        (hidden,) = products(x, [mlp.up.weight], normed=True, squared_relu=True)
        (after,) = products(hidden, [mlp.down.weight], residual=x)
    assert torch.equal(after, x + mlp(norm(x)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "depth"), [(1, 256), (3, 192), (8, 520), (9, 256), (17, 72), (70, 40)])
def test_kernels_equal_the_plain_form(rows, depth, form, device, monkeypatch):
    force(monkeypatch, PRODUCTS)
    compare(device, form, rows, depth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("form", FORMS)
def test_tiles_of_every_kind_are_the_same(form, tile, device, monkeypatch):
    from lepton.ops.triton import products as kernels

    force(monkeypatch, PRODUCTS)
    monkeypatch.setattr(kernels, "FEW", ((37, 0, kernels.MOST, kernels.Tile(*tile)),))
    compare(device, form, 37, 200)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stream", [(1, 1, 1), (4, 2, 3), (8, 4, 2)])
def test_streams_of_every_kind_are_the_same(stream, device, monkeypatch):
    from lepton.ops.triton import products as kernels

    force(monkeypatch, PRODUCTS)
    monkeypatch.setattr(kernels, "FEW", ((5, 0, kernels.MOST, kernels.Stream(*stream)),))
    compare(device, "query, key, value", 5, 1100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("few", "many"), [(5, 8), (9, 16)])
def test_a_row_does_not_depend_on_others(few, many, form, device, monkeypatch):
    """Nor on the call: sums have one order."""
    force(monkeypatch, PRODUCTS)
    x, weights, options = draw(form, many, 320, device, half(device))
    first = products(x, weights, **options)
    assert all(torch.equal(one, other) for one, other in zip(products(x, weights, **options), first, strict=True))
    if options["residual"] is not None:
        options["residual"] = options["residual"][:few]
    if options["added"] is not None:
        options["added"] = options["added"]._replace(row_M=options["added"].row_M[:few])
    x = x[:few].clone()
    x[0] = 3
    found = products(x, weights, **options)
    assert all(torch.equal(one[1:], other[1:few]) for one, other in zip(found, first, strict=True))


MASKS = {"all": lambda m: m >= 0, "none": lambda m: m < 0, "some": lambda m: m % 3 == 1, "the last": lambda m: m == 39}


@pytest.mark.parametrize("device", ["plain", *DEVICES])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_rows_that_are_not_wanted_are_0(rows, form, device, monkeypatch):
    """With the first matrix alone, whatever their inputs are; the others are as without a mask."""
    force(monkeypatch, PRODUCTS, answer=device != "plain")
    place = "cpu" if device == "plain" else device
    x, weights, options = draw(form, rows, 128, place, torch.bfloat16 if device == "cuda" else torch.float32)
    expected = products(x, weights, **options)
    nothing = products(x, [torch.zeros_like(weight) for weight in weights], **options)
    for mask in MASKS.values():
        wanted = mask(torch.arange(rows, device=place))
        first, *others = products(x, weights, **options, wanted_M=wanted)
        assert torch.equal(first, torch.where(wanted[:, None], expected[0], nothing[0]))
        assert all(torch.equal(*pair) for pair in zip(others, expected[1:], strict=True))
        broken = [torch.full_like(weights[0], float("nan")), *weights[1:]]
        noise = torch.where(wanted[:, None], x, float("nan"))
        assert torch.equal(products(noise, weights, **options, wanted_M=wanted)[0], first)
        if not wanted.any():
            assert torch.equal(products(x, broken, **options, wanted_M=wanted)[0], first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_without_a_wanted_row_a_matrix_is_not_read(rows, device, monkeypatch):
    """The sums of a tile that is skipped are exactly 0, even of inputs and weights that are not numbers."""
    from lepton.ops.triton import products as kernels

    force(monkeypatch, PRODUCTS)
    x, weights, _ = draw("none of it", rows, 256, device, half(device))
    tile = kernels.sizes_of(rows, 33, 256, False)
    tile_rows = rows if isinstance(tile, kernels.Stream) else tile.rows
    wanted = torch.arange(rows, device=device) >= tile_rows  # nothing of the first tile
    broken, residual = torch.full_like(weights[0], float("nan")), torch.ones_like(x[:, :33])
    (found,) = products(x, [broken], residual=residual, wanted_M=wanted)
    assert (found[:tile_rows] == 1).all()
    assert found[tile_rows:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [2, 20])
def test_roundings_are_those_of_the_plain_form(rows, device, monkeypatch):
    """Where sums are exact: y is rounded before the square, and before the residual is added."""
    force(monkeypatch, PRODUCTS)
    x, weight = (torch.randint(-15, 16, (count, 256)).to(device, half(device)) for count in (rows, 24))
    x /= 256
    residual = torch.randn(rows, 24).to(x)
    added = Added(torch.randn(3, 24).to(x), torch.arange(rows, device=device) % 3)
    for options in (
        {"added": added, "squared_relu": True},
        {"squared_relu": True},
        {"residual": residual},
        {"residual": residual, "residual_normed": True},
        {"squared_relu": True, "residual": residual},
    ):
        assert torch.equal(products(x, [weight], **options)[0], plain_products(x, [weight], **options)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_every_size_has_a_line_in_the_tables(device):
    from lepton.ops.triton import products as kernels

    for size, normed in itertools.product(SIZES.values(), (True, False)):
        for depth, outputs in ((size.width, size.ffn), (size.ffn, size.width)):
            stream = kernels.sizes_of(1, outputs, 768, normed)
            steps = -(-depth // (256 * stream.warps))
            assert steps % kernels.unroll_of(depth, stream) == 0
            tiles = [kernels.sizes_of(rows, outputs, 768, normed) for rows in (9, 64, MOST_ROWS)]
            assert tiles == sorted(tiles, key=kernels.TILES.index, reverse=True)
            assert all(tile.norms for tile in tiles) or not normed


@pytest.mark.parametrize("device", DEVICES)
def test_a_tile_of_asynchronous_products_does_not_norm(device, monkeypatch):
    """Its inputs would be overwritten while they are read: triton-lang/triton#7110."""
    from lepton.ops.triton import products as kernels

    force(monkeypatch, PRODUCTS)
    unsafe = kernels.Tile(64, 32, 64, 1, 4, 3)
    monkeypatch.setattr(kernels, "FEW", ())
    monkeypatch.setattr(kernels, "TILES", (unsafe, *kernels.TILES))
    assert kernels.sizes_of(512, 2560, 768, normed=False) == unsafe
    assert kernels.sizes_of(512, 2560, 768, normed=True) != unsafe
    monkeypatch.setattr(kernels, "FEW", ((512, 0, kernels.MOST, unsafe),))
    x, weights, options = draw("up", 3, 64, device)
    with pytest.raises(AssertionError):
        products(x, weights, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_pytorch_computes_many_rows(device, monkeypatch):
    asked = force(monkeypatch, PRODUCTS)
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    x, weights, options = draw("up", 4, 64, device)
    assert torch.equal(products(x, weights, **options)[0], plain_products(x, weights, **options)[0])
    assert not asked


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_keeps_its_word_to_the_compiler(form, device):
    x, weights, options = draw(form, 2, 64, device)
    flags = (options.get("normed", False), options.get("squared_relu", False))
    added = (None, None) if options["added"] is None else options["added"]
    more = (*flags, *added, options.get("residual_normed", False))
    for wanted in (None, x[:, 0] > 0):
        torch.library.opcheck(module._products, (x, weights, options["residual"], *more, wanted))


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_one_operation_that_counts_those_of_a_linear_layer(device, monkeypatch):
    x, weights, options = draw("query, key, value", 3, 64, device)
    counts = []
    for answer in (True, False):
        force(monkeypatch, PRODUCTS, answer)
        traced = make_fx(lambda: products(x, weights, **options))()
        calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert (torch.ops.lepton.products.default in calls) == answer
        with FlopCounterMode(display=False) as counter:
            products(x, weights, **options)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_cpu_computes_the_plain_form(monkeypatch):
    asked = force(monkeypatch, PRODUCTS, answer=False)
    x, weights, options = draw("up", 3, 64)
    assert torch.equal(products(x, weights, **options)[0], plain_products(x, weights, **options)[0])
    assert asked == [(torch.device("cpu"), torch.float32)]


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 33, 64, 320, 512, 1024])
def test_full_sizes(rows, dtype, device, monkeypatch):
    for name in ("nano", "tiny", "medium", "xxl"):
        size = SIZES[name]
        counts = [size.heads * size.head_dim, *[size.kv_heads * size.head_dim] * 2]
        for form, depth, outputs in (
            ("query, key, value", size.width, counts),
            ("out", counts[0], [size.width]),
            ("up", size.width, [size.ffn]),
            ("out", size.ffn, [size.width]),
        ):
            monkeypatch.setitem(FORMS, form, (outputs, FORMS[form][1]))
            compare(device, form, rows, depth, dtype)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("rows", [5, 64])
def test_a_cuda_graph_replays_it(rows, device):
    x, weights, options = draw("query, key, value", rows, 768, device, torch.bfloat16)
    products(x, weights, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = products(x, weights, **options)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(replayed, products(x, weights, **options), strict=True))
