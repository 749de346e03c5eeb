"""`import lowrank` is light, and teaches `from_pretrained` whichever of the two is imported first."""

import os
import subprocess
import sys

import pytest

import lowrank


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::UserWarning:lowrank", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


@pytest.fixture
def saved(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8).save_pretrained(tmp_path)
    return tmp_path


ORDERS = {
    "lowrank-first": "import lowrank; import transformers",
    "transformers-first": "import transformers; import lowrank",
    "lowrank-after-the-class": "from transformers import BertModel; import lowrank; import transformers",
    "lowrank-first-then-the-class": "import lowrank; from transformers import BertModel; import transformers",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_the_order_of_imports_is_free(imports, saved):
    code = f"""
import sys
{imports}
model = transformers.AutoModel.from_pretrained(sys.argv[1])
print(type(model.encoder.layer[0].attention.self.query).__name__)
print([type(finder).__name__ for finder in sys.meta_path])
"""
    done = run_python(code, saved)
    assert done.returncode == 0, done.stderr
    layer, finders = done.stdout.splitlines()[-2:]
    assert layer == "LowRankLinear"
    assert "PluginFinder" not in finders


def test_a_conv1d_of_transformers_is_known_without_its_models():
    code = """
from transformers.pytorch_utils import Conv1D
from lowrank import LowRankLinear
print(LowRankLinear.from_linear(Conv1D(32, 64), rank=4).layer_type)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "conv1d"


def test_importing_lowrank_imports_neither_transformers_nor_matplotlib():
    code = """
import sys, lowrank
heavy = {"transformers", "matplotlib", "typer", "rich", "pandas", "scipy", "accelerate"}
print(sorted(heavy & set(sys.modules)))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_config_class_can_be_imported_from_lowrank_alone():
    done = run_python("from lowrank import LowRankConfig; print(LowRankConfig(rank=100).budget)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rank=100"


def test_reloading_the_module_that_was_hooked_still_works():
    code = """
import lowrank, transformers, importlib
import transformers.modeling_utils as m
assert m.__spec__.loader is m.__loader__
print(type(m.__loader__).__name__)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "SourceFileLoader"


def test_transformers_still_imports_if_the_plugin_does_not_fit_it():
    code = """
import sys, warnings
import lowrank
sys.modules["lowrank.hf"] = None  # importing it raises ImportError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.modeling_utils
print([str(w.message) for w in caught if "plug-in does not fit" in str(w.message)] != [])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_every_public_name_exists():
    assert all(getattr(lowrank, name) is not None for name in lowrank.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        lowrank.compres  # noqa: B018
