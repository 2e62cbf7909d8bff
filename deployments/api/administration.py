"""Who may change what a running server serves."""

from starlette.requests import Request

from deployments.api.permissions import require_admin
from deployments.chat.errors import APIError
from deployments.router.directory import ModelDirectory


def require_administrator(request: Request, directory: ModelDirectory) -> None:
    """Refuse a request that is not an administrator's.

    Raises:
        APIError: a 403; its key has another role, or no keys are configured and other machines may reach the server.
    """
    require_admin(request)
    if not directory.access.needs_key and not directory.platform.allow_admin_without_keys:
        raise APIError(
            403,
            "Without API keys, nobody is known to be an administrator. Set api_keys_env or api_keys_file; or listen on "
            "127.0.0.1 (http_options.host); or set allow_admin_without_keys: true",
            code="insufficient_permissions",
        )
