"""Compressed models leave PyTorch: `torch.export`, `torch.compile`, and ONNX, run by ONNX Runtime.

The truth is the decompressed model in eager mode: ordinary dense layers, none of this library's. Of
compiled graphs, which have the kernels for integers too, it is the model itself in eager mode.
"""

import copy
import io
import warnings
from contextlib import redirect_stdout

import pytest
import torch
import transformers
from closeness import CANCELLED32, LAYERS32, agreement
from torch import nn

import lowrank
from lowrank.linalg import matmul
from lowrank.nn import QuantizedModule, integer_matmul
from lowrank.nn.shared import SharedDown

SHAPES = [(3, 10), (1, 7), (5, 33)]
"""Batch and sequence that exported models are run with; the first is what they are traced with."""

SETTINGS = {
    "shared": {"rank": 16, "share": "inputs"},
    "int8": {"keep": 0.5, "quantize": "int8"},
    "int4": {"rank": 32, "quantize": "int4"},
    "correction": {"rank": 16, "quantize": "int4", "correction": True},
}
"""Factors, some of them shared; the same and embeddings as integers; integers that factors correct."""

LINEAR = torch.ops.lowrank.linear, torch.ops.lowrank.linear.default, matmul.linear_unseen
INT4 = (
    torch.ops.lowrank.int4_product,
    torch.ops.lowrank.int4_product.default,
    integer_matmul.int4_product_unseen,
)
"""How graphs may name the operators."""

only_bert = pytest.mark.parametrize("dense", ["bert"], indirect=True)
only_llama = pytest.mark.parametrize("dense", ["llama"], indirect=True)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256, vocab_size=99
    )
    return transformers.BertModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=112,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def inputs(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Make token ids and a mask; the first sequence is padded to its second half."""
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, (tokens + 1) // 2 :] = 0
    return {"input_ids": torch.randint(5, 99, (batch, tokens), generator=generator), "attention_mask": mask}


@pytest.fixture(scope="module", params=["bert", "llama"])
def dense(request):
    """A model and its statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"bert": bert, "llama": llama}[request.param]().eval()
        return model, lowrank.calibrate(model, [inputs(4 + i, 12) for i in range(6)])


def made(dense, setting: str) -> nn.Module:
    """Compress a copy, and run it: what it keeps from one call to the next must not be exported."""
    model, stats = dense
    model = lowrank.compress(copy.deepcopy(model), stats=stats, **SETTINGS[setting])
    with torch.no_grad():
        model(**inputs(*SHAPES[0]))
    return model


def main_output(outputs) -> torch.Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def expected(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return main_output(lowrank.decompress(copy.deepcopy(model))(**given))


def assert_rounded_alike(found, wanted, given):
    """Compare real tokens: products of 256 terms lose about √256 roundings, and a dozen follow each other."""
    real = given["attention_mask"].bool()
    error = (found - wanted).abs()[real].max()
    assert error <= 12 * 256**0.5 * torch.finfo(torch.float32).eps * wanted.abs().max()


def exported_to_onnx(model: nn.Module, **options):
    pytest.importorskip("onnxscript", reason="needs torch-lowrank[export]")
    pytest.importorskip("onnxruntime", reason="needs torch-lowrank[export]")
    from transformers.exporters import OnnxConfig, OnnxExporter

    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return OnnxExporter().export(model, inputs(*SHAPES[0]), config=OnnxConfig(dynamic=True, **options))


def bytes_by_dtype(exported) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in exported.program.graph.initializers.values():
        name = value.const_value.dtype.name
        found[name] = found.get(name, 0) + value.const_value.nbytes
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_onnx_runtime_computes_the_same_for_any_batch_and_length(dense, setting):
    model = made(dense, setting)
    exported = exported_to_onnx(model)
    for shape in SHAPES:
        given = inputs(*shape)
        assert_rounded_alike(main_output(exported(**given)), expected(model, given), given)


@only_llama
def test_a_factorized_table_and_the_head_tied_to_it_are_exported(dense):
    model = copy.deepcopy(dense[0])
    lowrank.compress(model, rank=16, targets=["*", "model.embed_tokens"], quantize="int8")
    assert isinstance(model.model.embed_tokens, lowrank.LowRankEmbedding)
    assert isinstance(model.lm_head, lowrank.nn.TiedLinear)
    given = inputs(5, 33)
    exported = exported_to_onnx(model)
    assert_rounded_alike(main_output(exported(**given)), expected(model, given), given)


@only_bert
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_onnx_file_holds_what_the_checkpoint_holds(dense, setting, tmp_path):
    model = made(dense, setting)
    exported = exported_to_onnx(model, optimize=False)
    exported.save_pretrained(tmp_path)
    held, given = bytes_by_dtype(exported), inputs(5, 33)
    owned = [m.owns_down for m in model.modules() if isinstance(m, lowrank.LowRankLinear)]
    assert all(owned) == (setting != "shared")
    for dtype, name in {torch.int8: "INT8", torch.uint8: "UINT8"}.items():
        codes = [
            m.codes for m in model.modules() if isinstance(m, QuantizedModule) and m.codes.dtype == dtype
        ]
        assert held.get(name, 0) == sum(tensor.nbytes for tensor in codes)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    positions = 2 * 512 * 8  # BERT's, which its checkpoint leaves out
    assert sum(held.values()) <= weights + positions + 1024
    assert (tmp_path / "model.onnx.data").stat().st_size <= 1.1 * sum(held.values())  # aligned
    assert_rounded_alike(main_output(exported(**given)), expected(model, given), given)


@only_bert
def test_onnx_runtime_can_code_the_factors_itself(dense):
    pytest.importorskip("onnxruntime", reason="needs torch-lowrank[export]")
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    model = made(dense, "shared")
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    exported = exported_to_onnx(model, quantizer=quantizer)
    integers = [node for node in exported.program.graph if node.op_type == "MatMulInteger"]
    factorized = [m for m in model.modules() if isinstance(m, lowrank.LowRankLinear)]
    assert len(integers) >= 2 * len(factorized) > 0
    given = inputs(5, 33)
    found, wanted = main_output(exported(**given)), expected(model, given)
    assert agreement(found, wanted) > 0.99


@pytest.mark.parametrize("setting", SETTINGS)
def test_torch_export_gives_plain_layers_for_any_batch_and_length(dense, setting):
    model = made(dense, setting)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs(*SHAPES[0]), dynamic_shapes={"input_ids": axes, "attention_mask": axes}
        )
    operators = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert operators <= {"aten", "_operator", "higher_order", "prim"}, operators  # nothing of one machine
    for shape in SHAPES:
        given = inputs(*shape)
        with torch.no_grad():
            found = main_output(program.module()(**given))
        assert_rounded_alike(found, expected(model, given), given)


@pytest.fixture
def fresh_compiler():
    """Forget the graphs of other tests: there is a limit for each class of model."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def that_run_on(kernel: str, model: nn.Module) -> list[nn.Module]:
    layers = [m for m in model.modules() if isinstance(m, (lowrank.QuantizedLinear, lowrank.nn.TiedLinear))]
    return [layer for layer in layers if layer.runs_on().startswith(kernel)]


def assert_compiled_as_eager(found, model: nn.Module, given):
    """With codes, one input in many thousands is rounded elsewhere, as sums before it have another order."""
    with torch.no_grad():
        eager = main_output(model(**given))
    if any(isinstance(m, QuantizedModule) for m in model.modules()):
        assert (found - eager).square().sum() <= 1e-5 * eager.square().sum()
    else:
        assert_rounded_alike(found, eager, given)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("setting", SETTINGS)
def test_one_compiled_graph_serves_any_batch_and_length(dense, setting):
    model = made(dense, setting)
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for shape in [(3, 10), (4, 7), (5, 33)]:
            given = inputs(*shape)
            assert_compiled_as_eager(main_output(compiled(**given)), model, given)
    integers, packed = that_run_on("int8", model), that_run_on("int4", model)
    assert len(graphs) == (2 if packed else 1)  # 165 tokens are too many for the kernel
    assert [graph.count(torch._int_mm) for graph in graphs] == [len(integers)] * len(graphs)
    found = [sum(target in INT4 for target in graph) for graph in graphs]
    assert found == [len(packed), 0][: len(graphs)]


@only_bert
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("setting", ["shared", "int8"])
def test_a_compiled_graph_with_gradients_has_no_kernels(dense, setting):
    model, given = made(dense, setting), inputs(4, 7)
    output = main_output(torch.compile(model, fullgraph=True, backend="aot_eager")(**given))
    assert_rounded_alike(output.detach(), expected(model, given), given)
    output.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    main_output(model(**given)).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=CANCELLED32, atol=LAYERS32)


@only_bert
@pytest.mark.skipif(not matmul.AVAILABLE, reason="PyTorch's own product is as fast here")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_factors_have_the_faster_product(dense):
    model, given = made(dense, "shared"), inputs(4, 7)
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, dynamic=True, backend=backend)(**given)
    factorized = [m for m in model.modules() if isinstance(m, lowrank.LowRankLinear)]
    owners = [m for m in factorized if m.owns_down]
    assert len(owners) < len(factorized)
    products_found = sum(target in LINEAR for target in graphs[0])
    assert products_found == len(factorized) + len(owners)  # the shared ones once
    shared = [m for m in model.modules() if isinstance(m, SharedDown)]
    assert shared and all(down.kept is None for down in shared)
    rows = torch.randn(40, 16), torch.randn(8, 16), torch.randn(8)
    torch.library.opcheck(torch.ops.lowrank.linear.default, rows)


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("setting", SETTINGS)
def test_inductor_computes_the_same(dense, setting):
    model, given = made(dense, setting), inputs(4, 7)
    with torch.no_grad():
        found = main_output(torch.compile(model, fullgraph=True)(**given))
    assert_compiled_as_eager(found, model, given)


def dense_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("setting", [{"rank": 16}, {"rank": 16, "quantize": "int8"}, {"quantize": "int8"}])
def test_compiled_transforms_of_functions_are_those_of_eager_mode(setting):
    model = dense_layers().requires_grad_(False)
    lowrank.quantize(model) if "rank" not in setting else lowrank.compress(model, **setting)
    x = torch.randn(40, 64)
    transformed = {
        "grad": torch.func.grad(lambda x: model(x).square().sum()),
        "jvp": lambda x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
        "jacrev": lambda x: torch.func.jacrev(model)(x[0]),
        "vmap": torch.func.vmap(model),
    }
    for function in transformed.values():
        with torch.no_grad():
            found = torch.compile(function, backend="aot_eager")(x)
            torch.testing.assert_close(found, function(x), rtol=LAYERS32, atol=LAYERS32)


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_compiled_layer_may_read_a_transposed_tensor(scheme):
    model, x = lowrank.quantize(dense_layers(), scheme), torch.randn(1, 64, 20).transpose(1, 2)
    with torch.no_grad():
        eager = model(x)
        # Inputs that are rounded the other way at a tie differ by a step of int8: 1/127.
        torch.testing.assert_close(torch.compile(model)(x), eager, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_wrapped_model_is_refused(tmp_path):
    compiled = torch.compile(dense_layers())
    for call in (
        lambda: lowrank.compress(compiled, rank=4),
        lambda: lowrank.decompress(compiled),
        lambda: lowrank.save(compiled, tmp_path / "model"),
    ):
        with pytest.raises(lowrank.LowRankError, match=r"wrapped by torch\.compile"):
            call()
