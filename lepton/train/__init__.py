"""Training, from a data set and a configuration to checkpoints that resume exactly.

`from lepton.train.trainer import train` and `from lepton.train.settings import TrainSettings` are the way in.
"""
