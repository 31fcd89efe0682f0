"""The ideas of LEPTON, in the order in which they run. A new idea is a file here, an import and a line in this list."""

from lepton.config import IdeaConfig, register
from lepton.model.ideas.crystals import CrystalsConfig
from lepton.model.ideas.drafter import DrafterConfig
from lepton.model.ideas.peek import PeekConfig
from lepton.model.ideas.router import RouterConfig
from lepton.model.ideas.thoughts import ThoughtsConfig
from lepton.model.ideas.uncertainty import UncertaintyConfig
from lepton.model.ideas.working_memory import WorkingMemoryConfig

IDEAS: tuple[type[IdeaConfig], ...] = (
    ThoughtsConfig,
    WorkingMemoryConfig,
    CrystalsConfig,
    PeekConfig,
    RouterConfig,
    DrafterConfig,
    UncertaintyConfig,
)

register(*IDEAS)
