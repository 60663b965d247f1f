"""Generative judging (SPCT, 2504.02495): prompts for a group of responses, scores read back, votes over samples."""
