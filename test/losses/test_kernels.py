"""losses/kernels: the same as PyTorch's operations · hostile input · compiles · absence.

The kernels run on a GPU; where there is none, one test runs the others in Triton's interpreter.
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import kernels, lattice, transducer
from espnet_pl.losses.joint import Joint, planes
from espnet_pl.losses.lattice import full_sum
from espnet_pl.losses.transducer import hypotheses, log_probability

HERE = Path(__file__).resolve()
DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
WITH_TRITON = importlib.util.find_spec("triton") is not None
RUN = WITH_TRITON and (kernels.INTERPRETED or torch.cuda.is_available())
runs = pytest.mark.skipif(
    not RUN,
    reason="no GPU: test_in_the_interpreter runs it" if WITH_TRITON else "Triton is not installed",
)
# Before 3.7 its interpreter knows no loops with NumPy 2.4: "only 0-dimensional arrays can be …".
INTERPRETS = WITH_TRITON and [int(x) for x in version("triton").split(".")[:2]] >= [3, 7]
needs_triton = pytest.mark.skipif(not WITH_TRITON, reason="Triton is not installed")
drawn = settings(deadline=None, max_examples=15, derandomize=True)


@pytest.mark.skipif(kernels.INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(not INTERPRETS, reason="Triton is not installed, or older than 3.7")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    run = subprocess.run(
        command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


def with_and_without(function):
    """What a function of no arguments gives with the kernels, and with PyTorch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCKS", dict.fromkeys(kernels.BLOCKS, (16, 16, 16)))
        patch.setattr(kernels, "ON", True)
        assert kernels.available(torch.zeros(1, device=DEVICE))
        with_them = function()
        patch.setattr(kernels, "ON", False)
        assert not kernels.available(torch.zeros(1, device=DEVICE))
        return with_them, function()


def same(function, tolerance):
    torch.testing.assert_close(
        *with_and_without(function), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def random(*shape, seed, dtype=torch.float64):
    """The same numbers on every device."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def integers(numbers):
    return torch.tensor(numbers, dtype=torch.long, device=DEVICE)


def value_and_gradients(log_p, inputs, seed=1):
    """Gradients of a sum with weights of both signs; of −inf there is none."""
    weights = random(*log_p.shape, seed=seed, dtype=log_p.dtype)
    total = (weights * log_p.masked_fill(log_p.isneginf(), 0.0)).sum()
    return log_p.detach(), torch.autograd.grad(total, inputs, materialize_grads=True)


def arcs(sizes, seed, dtype=torch.float64, impossible=0.0, room=1):
    """Of lattices of so many frames and labels; behind every end, numbers not to be read."""
    frames, lengths = (integers(x) for x in zip(*sizes))
    k, t, u = len(sizes), int(frames.max()) + room, int(lengths.max()) + room
    inputs = [random(k, n, t, seed=seed + n, dtype=dtype) - 1 for n in (u + 1, u)]
    for x in inputs:
        x[random(*x.shape, seed=seed + 99).sigmoid() < impossible] = -torch.inf
        x.requires_grad_()
    return inputs, frames, lengths


sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4)


@runs
@drawn
@given(sizes, st.integers(0, 10**6), st.sampled_from([0.0, 0.2]))
def test_lattices(sizes, seed, impossible):
    inputs, *of_each = arcs(sizes, seed, impossible=impossible)
    same(lambda: value_and_gradients(full_sum(*inputs, *of_each), inputs), 1e-12)


@runs
@drawn
@given(sizes, st.integers(0, 10**6), st.sampled_from([0.0, 0.2]))
def test_every_partial_sum(sizes, seed, impossible):
    inputs, *of_each = arcs(sizes, seed, impossible=impossible)
    inputs = [x.detach() for x in inputs]
    same(lambda: lattice._Grid(*inputs, *of_each).sweeps(both=True), 1e-12)
    same(lambda: lattice._Grid(*inputs, *of_each).sweeps(both=False)[0], 1e-12)


@runs
@pytest.mark.parametrize("u", [0, 1, 6, 7, 8, 31])  # with one state more, blocks full and not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_number_of_states(u, dtype):
    inputs, *of_each = arcs([(1, u), (3, u // 2)], seed=u, dtype=dtype, room=0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6  # gradients have the type of the arcs
    same(lambda: value_and_gradients(full_sum(*inputs, *of_each), inputs), tolerance)


@runs
def test_long_lattices_lose_nothing():
    inputs, *of_each = arcs([(150, 9)], seed=0, room=0)
    inputs = [(5 * x).detach().requires_grad_() for x in inputs]
    same(lambda: value_and_gradients(full_sum(*inputs, *of_each), inputs), 1e-10)


@runs
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(which, bad):
    inputs, *of_each = arcs([(3, 2), (3, 2)], seed=0, room=0)
    inputs = [x.detach() for x in inputs]
    inputs[which][1, 0, 0] = bad
    same(lambda: full_sum(*inputs, *of_each), 1e-12)
    assert full_sum(*inputs, *of_each).isfinite().tolist() == [True, False]


@runs
def test_a_number_that_meets_minus_infinity_only():
    inputs, *of_each = arcs([(2, 1)], seed=0, room=0)
    blank, label = (x.detach() for x in inputs)
    blank[0, 0, 0], label[0, 0, 0] = torch.nan, -torch.inf
    same(lambda: full_sum(blank, label, *of_each), 0)
    assert full_sum(blank, label, *of_each).isnan().all()


@runs
def test_no_lattice():
    none = integers([])
    blank, label = (torch.zeros(0, u, 3, device=DEVICE) for u in (2, 1))
    same(lambda: full_sum(blank, label, none, none), 0)


def network(t, j, v, seed, dtype=torch.float64, impossible=False):
    """Two utterances, the second one shorter; five states; tokens anywhere, some padded.

    The first node is not asked for: nobody may write there.
    """
    shapes = (2, t, j), (5, j), (v, j), (v,)
    inputs = [random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]
    if impossible:
        inputs[3][:: 3 if v > 1 else 2] = -torch.inf
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, v, (5, 3), generator=g)
    tokens[:, 0] = torch.randint(v, (), generator=g)  # the blank: any token
    tokens[4, 1:] = -1
    frames = integers([t, max(t - 2, 0)])
    utterance, nodes = integers([0, 1, 1, 0, 0]), torch.rand(5, t, generator=g) < 0.8
    nodes[0, 0] = False
    given = frames, utterance, tokens.to(DEVICE), nodes.to(DEVICE)
    return [x.requires_grad_() for x in inputs], given


def ask(inputs, given, activation=torch.tanh, **how):
    encoded, predicted, weight, bias = inputs
    frames, utterance, tokens, nodes = given
    network = Joint(weight, bias, activation)
    return planes(network, encoded, frames, predicted, utterance, tokens, nodes=nodes, **how)


@runs
@drawn
@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6), st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_planes(t, j, v, seed, impossible, dtype):
    inputs, given = network(t, j, v, seed, dtype, impossible)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    same(lambda: ask(inputs, given).detach(), tolerance)


@runs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_behind_planes(dtype):
    inputs, given = network(6, 18, 33, 0, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4  # sums of some hundred numbers
    same(lambda: value_and_gradients(ask(inputs, given), inputs), tolerance)


@runs
def test_blocks_as_they_are_shipped():
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        inputs, given = network(9, 20, 40, 3, dtype)
        shipped = ask(inputs, given)
        assert (~shipped.isneginf()).sum() > kernels.BLOCKS[4][0]  # more than one block
        _, expected = with_and_without(lambda: ask(inputs, given))  # noqa: B023
        torch.testing.assert_close(shipped, expected, rtol=0, atol=tolerance)


@runs
def test_one_launch_for_all_nodes_and_no_logits(monkeypatch):
    inputs, given = network(9, 5, 7, 0)
    launches = []
    fill = kernels.fill_planes
    monkeypatch.setattr(kernels, "fill_planes", lambda *a: launches.append(len(a[1])) or fill(*a))
    monkeypatch.setattr("espnet_pl.losses.joint.Tile.compute", None)
    real = ~ask(inputs, given)[0].isneginf()
    assert launches == [int(real.sum())]
    ask(inputs, (0 * given[0], *given[1:]))
    assert launches[1:] == [0]


@runs
@pytest.mark.parametrize("how", [{"rest": True}, {"activation": torch.relu}])
def test_what_the_kernel_does_not_know_is_left_to_pytorch(how, monkeypatch):
    inputs, given = network(4, 5, 7, 0)
    monkeypatch.setattr(kernels, "fill_planes", None)
    same(lambda: ask(inputs, given, **how).detach(), 0)


@runs
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers(place, bad):
    inputs, given = network(3, 4, 20, 1)
    inputs = [x.detach() for x in inputs]
    inputs[place].view(-1)[1] = bad
    same(lambda: ask(inputs, given), 1e-10)


@runs
def test_no_token_at_all_is_possible():
    inputs, given = network(3, 4, 20, 1)
    inputs[3].data.fill_(-torch.inf)
    same(lambda: ask(inputs, given).detach(), 0)


@runs
@pytest.mark.parametrize("possible", [slice(0, 16), slice(16, 32), slice(32, 40)])
def test_no_token_of_a_block_is_possible(possible):
    inputs, given = network(3, 4, 40, 1)
    bias = torch.full_like(inputs[3], -torch.inf)
    bias[possible] = inputs[3].detach()[possible]
    given[2][:, 1] = possible.start
    same(lambda: ask([*inputs[:3], bias], given).detach(), 1e-10)
    assert ask([*inputs[:3], bias], given)[1].isfinite().any()


@runs
def test_logits_as_large_as_they_come():
    inputs, given = network(3, 4, 20, 1)
    inputs[2].data *= 1e5  # the sum of their exponentials has no number
    same(lambda: ask(inputs, given).detach(), 1e-10)


@runs
def test_memory_in_another_order():
    (encoded, predicted, weight, bias), given = network(4, 6, 9, 2)
    turned = [x.detach().mT.contiguous().mT for x in (encoded, predicted, weight)]
    same(lambda: ask([*turned, bias.detach()], given), 1e-10)
    torch.testing.assert_close(
        ask([*turned, bias], given), ask([encoded, predicted, weight, bias], given)
    )


@runs
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_products(half):
    if half == torch.bfloat16 and kernels.INTERPRETED:
        assert not kernels.available(torch.zeros(1, dtype=half))
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    inputs, given = network(6, 20, 40, 0, torch.float32)

    def shortened():
        with torch.autocast(DEVICE, half):
            return value_and_gradients(ask(inputs, given), inputs)

    (short, gradients), (expected, _) = with_and_without(shortened)
    exact = ask(inputs, given).detach()
    real = ~exact.isneginf()
    assert torch.equal(real, ~short.isneginf()) and short.dtype == torch.float32
    # Its sums are not rounded to half precision, those of PyTorch are.
    error, theirs = ((x - exact)[real].norm() for x in (short, expected))
    assert 0 < error <= 1.05 * theirs
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)


@runs
@pytest.mark.parametrize("exact", [False, True])
def test_log_probability_with_shared_states(exact, monkeypatch):
    monkeypatch.setattr(transducer, "LARGE", 0)  # look for a band, if not exact
    shapes = (2, 9, 8), (3, 4, 8), (12, 8), (12,)
    inputs = [3 * random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    encoded, predicted, weight, bias = inputs
    labels, lengths = integers([[1, 2, 3], [1, 2, 4], [5, 5, 0]]), integers([3, 3, 2])
    hyps = hypotheses(labels, lengths, integers([0, 0, 1]), blank=11)

    def loss():
        states = hyps.of_states(predicted)
        joint, frames = Joint(weight, bias), integers([9, 6])
        log_p = log_probability(joint, encoded, frames, states, hyps, exact=exact)
        return value_and_gradients(log_p, inputs)

    same(loss, 1e-10)


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
@pytest.mark.parametrize(("capability", "shared"), [(80, 101_376), (90, 232_448)])
def test_compiles_for_a_gpu_that_need_not_be_there(capability, shared):
    """And fits into the shared memory of a block: of all 8.x, 8.6 and 8.9 have the least.

    Source: NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from espnet_pl.losses import programs

    def compiled(program, pointers, constants, warps):
        types = dict.fromkeys(program.arg_names, "i32") | pointers
        source = ASTSource(program, types | dict.fromkeys(constants, "constexpr"), constants)
        target = GPUTarget("cuda", capability, 32)
        result = triton.compile(source, target=target, options={"num_warps": warps})
        assert result.metadata.shared <= shared
        return result

    numbers = dict.fromkeys(("blank", "label", "out"), "*fp64") | {"lengths": "*i64"}
    compiled(programs.sweep, numbers, {"STATES": 1}, 1)
    warp = compiled(programs.sweep, numbers, {"STATES": kernels.OF_A_WARP}, 1)
    assert warp.metadata.shared == 0  # it waits for no other warp
    compiled(programs.sweep, numbers, {"STATES": 512}, 512 // kernels.OF_A_WARP)

    numbers = dict.fromkeys(("utterance", "tokens", "index"), "*i64")
    for product, exact, size in (("bf16", "fp32", 2), ("fp32", "fp32", 4), ("fp64", "fp64", 8)):
        blocks = dict(zip(("ROWS", "VOCABULARY", "DIMENSIONS"), kernels.BLOCKS[size]))
        constants = blocks | {"ASKED": 2, "PRECISION": "ieee"}
        numbers |= dict.fromkeys(("encoded", "predicted", "bias", "out"), f"*{exact}")
        numbers["weight"] = f"*{product}"
        result = compiled(programs.planes, numbers, constants, kernels.WARPS)
        assert "tf32" not in result.asm["ptx"]
    one = {"dimensions": 1, "vocabulary": 1}  # Triton makes a constant of a 1
    compiled(programs.planes, numbers, constants | one, kernels.WARPS)


def test_without_a_gpu_triton_is_not_even_imported():
    program = (
        "import sys, torch; from espnet_pl.losses import kernels, transducer;"
        "print(kernels.available(torch.zeros(1)), 'triton' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=HERE.parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["False", "False"]


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "espnet_pl.losses.programs", None)  # its import fails
    monkeypatch.delattr("espnet_pl.losses.programs", raising=False)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    kernels._programs.cache_clear()
    assert not kernels.available(torch.zeros(1))
    kernels._programs.cache_clear()
