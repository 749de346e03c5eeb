"""`LowRankConfig`: what ``from_pretrained`` is asked for, and what ``config.json`` says was done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.arguments import flag
from lowrank.config import Budget, CompressionConfig, configured, documented
from lowrank.config.options import given_options, options_of
from lowrank.errors import BudgetError, CheckpointError, LowRankError
from lowrank.files.safetensors_header import Stored
from lowrank.hf.checks import (
    CONFIG,
    SECTION,
    check_config,
    compare_digests,
)
from lowrank.plans.plan import Plan
from lowrank.reports.model_card import HOW_TO_LOAD

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowrank.config import CompressionOptions

METHOD = "lowrank"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to do with a dense checkpoint, or what was done to a compressed one.

    Args:
        plan: The plan that was carried out, as `Plan.to_dict` gives it; then no option is needed.
        tensors, digest: What `lowrank.save` leaves in ``config.json``: digests of the tensors, and of the
            config. No model in memory has them: its config must not vouch for tensors that may change.
        how_to_load: A sentence in ``config.json`` for people whose program does not know the method.
        verify: For a folder that is compressed already, in place of options: whether the digests are
            compared (as they are by default).
        quant_method: The name under which transformers finds this class.
        **options: Those of `lowrank.compress` with exactly one budget, but for those that need data or inputs
            (`lowrank.config.CompressionConfig` lists them).

    Raises:
        LowRankError: If an option is malformed, or the plan is damaged or from another version.

    Example:
        >>> LowRankConfig(rank=100).budget.value
        100
    """

    # Of the class, so that a config that is written has those only which were given.
    plan: dict[str, Any] | None = None
    verify: bool | None = None
    tensors: Mapping[str, str] | None = None
    digest: str | None = None

    @documented(CompressionConfig, "LowRankConfig")
    def __init__(
        self,
        *,
        plan: dict[str, Any] | None = None,
        tensors: Mapping[str, str] | None = None,
        digest: str | None = None,
        how_to_load: str | None = None,
        verify: bool | None = None,
        quant_method: str = METHOD,
        **options: Unpack[CompressionOptions],
    ) -> None:
        config = None
        if options:
            config = configured(CompressionConfig, "LowRankConfig", None, options)
        self.quant_method = quant_method
        self.plan = plan
        given = sum((bool(options), plan is not None, verify is not None))
        if given > 1:
            raise BudgetError(
                "LowRankConfig: give a budget, a plan that was carried out, or verify, not two."
            )
        if plan is not None:
            Plan.from_dict(plan)  # a damaged plan, or one of another version, is refused here
            self.how_to_load = HOW_TO_LOAD
            if tensors is not None or digest is not None:
                self.tensors, self.digest = tensors, digest
            return
        if verify is not None:
            self.verify = flag("verify", verify)
            return
        config = config if config is not None else CompressionConfig()
        config.budget  # noqa: B018 - raises where there is none
        self.__dict__.update(given_options(config))

    @property
    def config(self) -> CompressionConfig:
        """The options of compression that were given."""
        names = {one.name for one in options_of(CompressionConfig)}
        return CompressionConfig(**{name: value for name, value in vars(self).items() if name in names})

    @property
    def budget(self) -> Budget:
        """The budget of a config that asks for compression."""
        return self.config.budget

    def carried_out(self) -> Plan:
        """Return the plan of a folder that is compressed already; raises `CheckpointError` without one."""
        if self.plan is None:
            raise CheckpointError(
                f"{CONFIG}: its {SECTION} has no plan, so what the tensors mean is not known. Copy it again."
            )
        return Plan.from_dict(self.plan)

    def check(self, headers: Mapping[str, Mapping[str, Stored]]) -> None:
        """Compare a folder's tensors, of which ``headers`` tell by file, with the digests, if there are some.

        Raises:
            CheckpointError: If a tensor, or the config beside them, is not as it was saved.
        """
        folder = Path(next(iter(headers))).parent
        if (folder / CONFIG).exists():  # the tensors of one folder may be loaded with the config of another
            check_config(folder / CONFIG)
        if self.tensors is not None or self.digest is not None:
            compare_digests(folder, headers, self.tensors)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return ``verify``, for a folder that is factorized: transformers asks this in no other case.

        Raises:
            LowRankError: If something else is asked of such a folder.
        """
        if self.verify is None:
            raise LowRankError(
                "from_pretrained(quantization_config=LowRankConfig(...)): this checkpoint is factorized "
                "already, and keeps its ranks. Load it without quantization_config, or compress the dense "
                "checkpoint."
            )
        return {"verify": self.verify}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the config from ``config.json``; raises `CheckpointError` for an unknown field."""
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise CheckpointError(f"config.json: the lowrank section is not understood: {error}.") from error
        except LowRankError as error:
            raise CheckpointError(f"config.json: {error}") from error


# Where a folder is quantized already, transformers only warns about the config that was passed, unless
# the class is in this table; then it asks the config for the attributes that still count. There is no
# function to register for that.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, LowRankConfig)
