"""Serve a bundle: OpenAI's API over ``racdeploy.load``, for several clients at once.

Everything here but this file needs starlette and uvicorn, the extra ``serve``.
"""
