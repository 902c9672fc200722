"""From records to claims: the tables, comparisons, summaries and figures of a study; needs no PyTorch."""
