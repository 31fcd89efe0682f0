"""Training: the loop and its parts, from a data set and a configuration to checkpoints that resume exactly."""

from lepton.train.settings import TrainSettings
from lepton.train.trainer import train

__all__ = ["TrainSettings", "train"]
