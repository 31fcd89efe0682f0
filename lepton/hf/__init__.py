"""LEPTON in transformers: after `import lepton.hf`, its Auto classes load exported folders. Needs the extra `hf`."""

from lepton.hf.remote_code import OLDEST
from lepton.requirements import need

need("transformers", "lepton.hf", OLDEST)

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from lepton.hf.cache import LeptonCache  # noqa: E402
from lepton.hf.configuration import LeptonHFConfig  # noqa: E402
from lepton.hf.modeling import LeptonForCausalLM, LeptonOutput  # noqa: E402

AutoConfig.register(LeptonHFConfig.model_type, LeptonHFConfig, exist_ok=True)
AutoModelForCausalLM.register(LeptonHFConfig, LeptonForCausalLM, exist_ok=True)

__all__ = ["LeptonCache", "LeptonForCausalLM", "LeptonHFConfig", "LeptonOutput"]
