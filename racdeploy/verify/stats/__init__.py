"""Paired statistics of two models over the same prompts; knows nothing of models, prompts or files.

Accuracy is judged by non-inferiority of the drop (:mod:`~racdeploy.verify.stats.paired`), length
by the ratio of restricted means (:mod:`~racdeploy.verify.stats.lengths`), two engines that shall
be alike by two one-sided tests. A verdict and its power are in one module, so that they cannot
drift apart.

Level: every ``confidence`` is that of a two-sided interval, and a gate looks at one end only. **A
two-sided 90 % interval gives a one-sided 5 % test**: in general the gate's level is
(1 - confidence) / 2. Counts are whole, so it is met approximately: a model at the margin passes at
most 5.5 % of the time from 50 prompts on, and fails as rarely.
"""
