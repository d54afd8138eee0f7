"""Bundles in repositories of the Hub: several of one model in one, as quantizers lay theirs out."""
