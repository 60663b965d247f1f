"""What judgements are worth: verdicts per item, a benchmark's measures, the whole k × k_meta sweep, tables."""
