"""Models of random weights: `shapes` has their sizes, `olmoe` makes one in PyTorch."""
