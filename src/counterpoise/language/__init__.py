"""Prompts into tokens, tokens into log-probabilities, models into responses.

Everything that samples from or scores with a causal language model goes through `sampling.sample`,
`scoring.continuation_logprobs` (evaluation: the context is computed once per item) and `scoring.response_nll` (training
and search: differentiable). Shape suffixes: B rows, T tokens, C continuation tokens, V vocabulary.
"""
