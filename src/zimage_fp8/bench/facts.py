"""What a checkpoint of ours says of its making, parsed from its transformer/config.json."""

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, model_validator

from zimage_fp8.bench.record import first_problem
from zimage_fp8.checkpoint.dialects import CONFIG_KEY, OWN_KEY
from zimage_fp8.checkpoint.own_format import METHOD as OWN_METHOD
from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import read_object
from zimage_fp8.numerics import QuantSpec


class RuleFacts(BaseModel):
    """One rule of the policy: a glob over layers, and how they are quantized or None."""

    layers: str
    spec: QuantSpec | None


class CalibrationFacts(BaseModel):
    prompts: int
    forwards: int
    sigmas: list[float]
    size: str
    seed: int
    dtype: str


class CheckpointFacts(BaseModel):
    """`algorithm` is ModelOpt's name of the format, or our own format's; calibration is None
    without static scales."""

    algorithm: str
    policy: str
    version: str
    base_model: str
    base_fingerprint: str
    rules: list[RuleFacts] = Field(min_length=1)
    calibration: CalibrationFacts | None = None
    calibration_digest: str | None = None

    @property
    def spec(self) -> QuantSpec:
        """How every quantized layer is quantized; in our own format the first of several ways."""
        return next(rule.spec for rule in self.rules if rule.spec)

    @model_validator(mode="after")
    def _agree_with_themselves(self) -> "CheckpointFacts":
        specs = {rule.spec for rule in self.rules if rule.spec}
        if len(specs) != 1 and (self.algorithm != OWN_METHOD or not specs):
            raise ValueError(f"the rules state {len(specs)} ways to quantize, expected one")
        if any(spec.is_static for spec in specs) and self.calibration is None:
            raise ValueError("static scales come from a calibration, here is none")
        return self


def read_facts(checkpoint: Path) -> CheckpointFacts | None:
    """The facts; None for a folder that is no quantized model, or one of another program.

    Raises ZImageError when config.json or the facts in it are damaged.
    """
    path = checkpoint / "transformer" / "config.json"
    if not path.exists():
        return None
    quantization = read_object(path).get(CONFIG_KEY)
    if not isinstance(quantization, dict) or OWN_KEY not in quantization:
        return None
    own = quantization[OWN_KEY]
    if not isinstance(own, dict):
        raise ZImageError(f"{path}: {OWN_KEY} is a {type(own).__name__}, expected an object")
    algorithm = quantization.get("quant_algo", quantization.get("quant_method"))
    try:
        return CheckpointFacts.model_validate({"algorithm": algorithm, **own})
    except ValidationError as error:
        raise ZImageError(f"{path}: {OWN_KEY}: {first_problem(error)}") from None
