"""Neural architecture search in plain PyTorch. Start reading at `nas.trial`."""
