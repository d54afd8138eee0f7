"""Bundles in repositories of the Hub: several of one model in one, as quantizers lay theirs out."""

from __future__ import annotations

from racdeploy.bundles.hub.pull import Pulled as Pulled
from racdeploy.bundles.hub.pull import pull as pull
from racdeploy.bundles.hub.push import Push as Push
from racdeploy.bundles.hub.push import plan_push as plan_push
from racdeploy.bundles.hub.push import push as push

__all__ = ["Pulled", "Push", "plan_push", "pull", "push"]
