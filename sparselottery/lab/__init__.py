"""What the lottery ticket paper did: its nets, data, training loop, controls and experiment (arXiv 1803.03635)."""
