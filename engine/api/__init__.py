"""The OpenAI API as a FastAPI router. No Gradio here: the router works in any app."""

from engine.api.routes import create_router

__all__ = ["create_router"]
