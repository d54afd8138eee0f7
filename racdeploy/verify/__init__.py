"""Verification: does the exported model still reason, as well and as briefly as the dense one?"""
