"""vitq.compile: which graph runs a batch, what is captured anew, what is refused; on a GPU, real graphs."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers import build, convert, images, quick
from torch import nn

import vitq
from vitq import graphs
from vitq.graphs import GraphedModel


class FakeGraph:
    """Reads its input and writes its output in place, as a captured graph does."""

    captured: list[tuple[int, ...]] = []

    def __init__(self, fn, static, pool=None):
        with torch.inference_mode():
            self.fn, self.static, self.output = fn, static, fn(static)
        self.captured.append(tuple(static.shape))

    def replay(self) -> None:
        with torch.inference_mode():
            self.output.copy_(self.fn(self.static))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.scale * x.flatten(1).sum(1, keepdim=True)


@pytest.fixture
def fake(monkeypatch):
    """GraphedModel on a CPU, with graphs that are no graphs."""
    FakeGraph.captured = []
    monkeypatch.setattr(graphs, "Graph", FakeGraph)
    monkeypatch.setattr(GraphedModel, "_graphless", lambda self, x: not x.numel())
    monkeypatch.setattr(GraphedModel, "_start", lambda self: None)
    monkeypatch.setattr(GraphedModel, "_end", lambda self: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return GraphedModel


def batch(n: int, size: int = 3) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(n))


def right(model, x) -> None:
    assert torch.equal(model(x), 2 * x.sum(1, keepdim=True))


def test_each_shape_is_captured_once(fake) -> None:
    model = fake(Rows().eval())
    for n in (8, 8, 8):
        right(model, batch(n))
    right(model, batch(8, 5))
    right(model, batch(8).double())
    assert FakeGraph.captured == [(8, 3), (8, 5), (8, 3)] and model.batches() == [8, 8, 8]


def test_a_smaller_batch_fills_up_a_graph_or_has_its_own(fake) -> None:
    model = fake(Rows().eval())
    for n in (16, 15, 9, 8, 5, 3, 1, 16, 2):
        right(model, batch(n))
    assert [shape[0] for shape in FakeGraph.captured] == [16, 8, 3, 1]  # 9..15 in 16, 5 in 8, 2 in 3
    first = model._graphs[torch.float32, (16, 3)].static
    assert all(graph.static.data_ptr() == first.data_ptr() for graph in model._graphs.values()), "one input buffer"


def test_the_smallest_graph_that_fits_is_taken(fake) -> None:
    model = fake(Rows().eval())
    for n in (4, 7, 5):  # each is more than half of the next, and captured first
        right(model, batch(n))
    assert sorted(model.batches()) == [4, 7]
    right(model, batch(3))
    assert sorted(model.batches()) == [4, 7]


def test_the_output_is_the_callers(fake) -> None:
    model, shared = fake(Rows().eval()), fake(Rows().eval(), clone=False)
    a, b = (m(batch(4)) for m in (model, shared))
    model(batch(3)), shared(batch(3))
    right(model, batch(4))
    assert torch.equal(a, 2 * batch(4).sum(1, keepdim=True)) and not torch.equal(b, a)


def test_images_of_another_device_or_layout_are_copied_in(fake) -> None:
    model = fake(Rows().eval())
    x = torch.randn(3, 6).t()
    assert torch.allclose(model(x), 2 * x.sum(1, keepdim=True))


def test_few_graphs_are_kept(fake, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    model = fake(Rows().eval())
    for size in (3, 4, 5, 3, 6):  # 3 was used after 4
        right(model, batch(2, size))
    assert [shape[1] for _, shape in model._graphs] == [5, 3, 6]


def test_moved_tensors_are_captured_anew(fake) -> None:
    model = fake(Rows().eval())
    right(model, batch(4))
    model.model.scale.data = torch.tensor(2.0)
    right(model, batch(4))
    model.to("cpu")
    right(model, batch(4))
    assert len(FakeGraph.captured) == 3


def test_a_loaded_model_is_captured_anew(fake) -> None:
    model, x = build(depth=1), None
    converted, other = (convert(m, quick("w8a8"), backend="reference") for m in (model, build(depth=1, seed=5)))
    x = images(model)
    graphed = fake(converted)
    first = graphed(x)
    converted.load_state_dict(other.state_dict())
    assert torch.equal(graphed(x), other(x)) and not torch.equal(first, other(x))
    assert len(FakeGraph.captured) == 2


def test_copies_capture_their_own(fake) -> None:
    model = fake(Rows().eval())
    right(model, batch(4))
    clone = copy.deepcopy(model)
    assert clone.batches() == [] and model.batches() == [4]
    right(clone, batch(4))


def test_threads_run_one_after_the_other(fake) -> None:
    model = fake(Rows().eval())
    wrong = []

    def work(n: int) -> None:
        for _ in range(50):
            x = batch(n)
            if not torch.equal(model(x), 2 * x.sum(1, keepdim=True)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (5, 6, 7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_gradients_may_alternate(fake) -> None:
    model, x = fake(Rows().eval()), batch(4)
    with torch.inference_mode():
        right(model, x)
    with torch.enable_grad():
        y = model(x.clone().requires_grad_())
    assert not y.requires_grad and torch.equal(y, model(x))


def test_an_empty_batch_runs_the_model(fake) -> None:
    model = fake(Rows().eval())
    assert model(torch.zeros(0, 3)).shape == (0, 1) and not FakeGraph.captured


def test_a_failed_capture_says_what_to_do(fake, monkeypatch) -> None:
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nlong explanation")

    monkeypatch.setattr(graphs, "Graph", refuse)
    with pytest.raises(RuntimeError, match=r"Rows cannot be captured .* \[2, 3\] \(operation not permitted when stream is "
                                           r"capturing\): call the model itself"):
        fake(Rows().eval())(batch(2))


@pytest.mark.gpu
def test_after_a_refused_capture_all_is_as_it_was() -> None:
    """torch.cuda.graph itself leaves its stream the current one, and its generator without random numbers."""
    x = torch.ones(4, device="cuda")
    current = torch.cuda.current_stream()
    torch.cuda.manual_seed(0)
    numbers = [torch.rand(4, device="cuda") for _ in range(2)]
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), numbers[0])
    with pytest.raises(RuntimeError):
        graphs.Graph(lambda t: t * t.sum().item(), x)  # read on the host
    assert torch.cuda.current_stream() == current and not torch.cuda.is_current_stream_capturing()
    assert torch.equal(torch.rand(4, device="cuda"), numbers[1])
    graph = graphs.Graph(lambda t: t + torch.rand_like(t), x)  # which draws numbers of its own at each replay
    graph.replay()
    first = graph.output.clone()
    graph.replay()
    assert not torch.equal(first, graph.output)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_captures_its_own() -> None:
    """torch.cuda.graph's own stream is of the device that captured first."""
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        model, x = vitq.compile(Rows().eval().to(device)), batch(4).to(device)
        assert torch.equal(model(x), model.model(x)) and torch.equal(model(x + 1), model.model(x + 1))


def test_outputs_that_are_no_batch_are_refused(fake) -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="one tensor"):
        fake(Pair().eval())(batch(2))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="torch.nn.Module, got function"):
        vitq.compile(lambda x: x)
    with pytest.raises(ValueError, match="training mode"):
        vitq.compile(Rows())
    model = GraphedModel(Rows().eval())
    with pytest.raises(RuntimeError, match="not trained"):
        model.train()
    with pytest.raises(TypeError, match="images must be a tensor"):
        model([1, 2])


def test_on_a_cpu_it_is_the_model_itself(caplog) -> None:
    model = Rows().eval()
    with caplog.at_level("WARNING", "vitq"):
        assert vitq.compile(model) is model and vitq.compile(GraphedModel(model)) is model
    assert len(caplog.records) == 2 and "CUDA graphs need a GPU" in caplog.text


# on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a8", "dual-w8a8", "dual-w4a4"])
@pytest.mark.parametrize("name, kwargs", [("deit_tiny_patch16_224", {"depth": 2}),
                                          ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}),
                                          ("vit_base_patch16_xp_224", {"depth": 1})])
def test_graphs_give_the_models_logits(name: str, kwargs: dict, recipe: str) -> None:
    model = build(name, **kwargs).cuda()
    converted = convert(model, quick(recipe))
    graphed = vitq.compile(converted, images(model, 8).cuda())
    assert graphed.batches() == [8]
    for n in (8, 7, 5, 2, 8):
        x = images(model, n, seed=n)
        expected = converted(x.cuda())
        assert torch.equal(graphed(x.cuda()), expected) and torch.equal(graphed(x), expected)
    assert sorted(graphed.batches()) == [2, 8]
    broken = images(model, 8).cuda()
    broken[3, 0, 0, 0] = torch.nan
    assert graphed(broken).isnan().any(1).tolist() == [i == 3 for i in range(8)]
    assert not graphed(images(model, 8).cuda()).isnan().any()


@pytest.mark.gpu
def test_streams_and_repeats() -> None:
    model = build(depth=2).cuda()
    converted = convert(model, quick("w8a8"))
    graphed, x = vitq.compile(converted), images(model, 4).cuda()
    expected = converted(x)
    results, side = [], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for i in range(20):
        with torch.cuda.stream(side if i % 2 else torch.cuda.current_stream()):
            results.append(graphed(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.gpu
def test_a_graph_follows_its_model() -> None:
    models = [convert(build(depth=1, seed=seed).cuda(), quick("w8a8")) for seed in (0, 5)]
    x = images(models[0]).cuda()
    graphed = vitq.compile(models[0], x)
    models[0].load_state_dict(models[1].state_dict())
    assert torch.equal(graphed(x), models[1](x))
