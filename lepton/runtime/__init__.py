"""What a process runs on: the device and its CUDA graphs, for training and generation alike."""
