"""`/openapi.json`, and `/docs`: a page on which every route can be read about and tried.

The page is Swagger UI, whose files BentoML brings along; nothing is fetched from elsewhere.
BentoML has its description at `docs.json`, so this one is there as well.
"""

from __future__ import annotations

import html
import importlib.util
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from mlops.serving.http.served import Served

SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")
PATHS = frozenset(
    {
        *("/openapi.json", "/docs.json", "/docs", "/docs/start.js"),
        *(f"/docs/{name}" for name in SWAGGER_FILES),
    }
)
"""All of these routes' paths."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"><a href="openapi.json">The description of this service</a></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Links are relative, so the page works behind any prefix.

_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null,
});
"""

_PAGE_HEADERS = {
    # No scripts or styles within the page; Swagger UI's style sheet has images within it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FILE_HEADERS = {"Cache-Control": "public, max-age=3600", "X-Content-Type-Options": "nosniff"}


def docs_routes(served: Served) -> list[Route]:
    """The routes of this module; none where the operator wants none."""
    if not served.settings.enable_docs:
        return []

    async def get_openapi(_: Request) -> Response:
        from mlops.serving.http.openapi import encode_api, features_of

        # Made once, in this thread: two threads cannot build one of pydantic's classes.
        return Response(encode_api(features_of(served)), media_type="application/json")

    async def get_page(_: Request) -> Response:
        page = _PAGE.format(title=html.escape(served.info.service_name))
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    return [
        Route("/openapi.json", get_openapi),
        Route("/docs.json", get_openapi),
        Route("/docs", get_page),
        Route("/docs/{name}", _get_file),
    ]


async def _get_file(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_FILE_HEADERS)
    path = _swagger_folder() / name
    if name not in SWAGGER_FILES or not path.is_file():
        raise HTTPException(404)
    return FileResponse(path, headers=_FILE_HEADERS)


def _swagger_folder() -> Path:
    """Where BentoML keeps Swagger UI; found without importing BentoML."""
    spec = importlib.util.find_spec("bentoml")
    package = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    return package / "_internal" / "server" / "static_content"
