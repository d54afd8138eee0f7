"""Paired statistics of two models over the same prompts; knows nothing of models, prompts or files.

A verdict and its power are in one module, so that they stay consistent.

Every ``confidence`` is that of a two-sided interval, and a gate looks at one end only: 90 % give a
one-sided test of (1 - 0.9) / 2 = 5 %. Counts are whole numbers, so the error is not exactly 5 %: a
model at the margin passes at most 5.5 % of the time from 50 prompts on, and fails as rarely.
"""
