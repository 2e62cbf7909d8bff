"""What the API key of a request may do. Where no keys are configured, everyone may do everything."""

from starlette.requests import Request

from deployments.accounts_config import Role
from deployments.chat.errors import APIError
from deployments.router.accounts import Account
from deployments.router.keys import ApiKey


def key_of(request: Request) -> ApiKey | None:
    """The API key that came with a request; None where no keys are configured."""
    account: Account | None = request.scope.get("state", {}).get("account")
    return account.key if account is not None else None


def is_admin(request: Request) -> bool:
    """Whether a request may do what is for administrators."""
    key = key_of(request)
    return key is None or key.role is Role.ADMIN


def require_admin(request: Request) -> None:
    """Refuse a request that is not an administrator's.

    Raises:
        APIError: a 403.
    """
    if not is_admin(request):
        raise APIError(
            403,
            "You have insufficient permissions for this operation: it needs an API key with role: admin",
            code="insufficient_permissions",
        )


def may_use(request: Request, *names: str) -> bool:
    """Whether a request may use a model or an adapter that has these names."""
    key = key_of(request)
    return key is None or key.may_use(*names)
