"""What clients and browsers expect of any HTTP server: HEAD, careless slashes, CORS, a description that is local."""

import hashlib
import re
from urllib.parse import urljoin

import httpx
import pytest
from in_process import Service, ServiceFactory, emulated_config
from pydantic import ValidationError

from deployments.config import AppConfig
from deployments.router.keys import ApiKey

KEY = "sk-test-key"
KEYS = (ApiKey("team", hashlib.sha256(KEY.encode()).digest()),)
BEARER = {"Authorization": f"Bearer {KEY}"}
PAGE = "https://chat.example.com"
LOADED = re.compile(r'(?:src|href)="(static/[^"]+)"')
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/fleet", "/v1/models", "/docs", "/openapi.json"])
async def test_what_answers_get_answers_head(make_service: ServiceFactory, path: str):
    service = await make_service()
    whole, head = await service.http.get(path), await service.http.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert (await service.http.head("/rayline/events")).status_code == 405, "it has no end"
    assert (await service.http.head("/v1/completions")).status_code == 405
    assert (await service.http.head("/nothing")).status_code == 404


@pytest.mark.parametrize("path", ["//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/",
                                  "///v1///chat/completions//"])  # fmt: skip
async def test_slashes_too_many(make_service: ServiceFactory, path: str):
    """Keys are asked for, and limits counted, as on the plain path."""
    service = await make_service(keys=KEYS)
    assert (await service.http.post(f"http://test{path}", json=CHAT)).status_code == 401
    answer = await service.http.post(f"http://test{path}", json=CHAT, headers=BEARER)
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "chat.completion"
    assert (await service.http.get("http://test//health/")).status_code == 200
    assert (await service.http.get("/v1/models/demo/", headers=BEARER)).json()["id"] == "demo"
    wrong = await service.http.post("http://test//v1//messages/", json={}, headers=BEARER)
    assert wrong.json()["type"] == "error", "in Anthropic's words"


async def test_slashes_behind_a_prefix(make_service: ServiceFactory):
    service = await make_service()
    transport = httpx.ASGITransport(service.api, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path in ("/llm/", "/llm", "/llm//", "//llm"):
            assert "<html" in (await http.get(f"http://test{path}")).text, path
        assert (await http.get("/llm//v1/models/")).json()["data"][0]["id"] == "demo"
        for page in ("/llm/fleet", "/llm/docs"):
            loaded = [urljoin("/llm/", name) for name in LOADED.findall((await http.get(page)).text)]
            assert loaded, page
            for address in loaded:
                assert (await http.get(address)).status_code == 200, address


def with_cors(**cors: object) -> AppConfig:
    return emulated_config(cors=cors)


def preflight(service: Service, origin: str, path: str = "/v1/chat/completions"):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    return service.http.options(path, headers=asked)


async def test_no_page_of_another_origin_by_default(make_service: ServiceFactory):
    service = await make_service()
    assert (await preflight(service, PAGE)).status_code == 405
    answer = await service.http.post("/v1/chat/completions", json=CHAT, headers={"Origin": PAGE})
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("cors", [{"allow_origins": [PAGE]}, {"allow_origins": ["*"]},
                                  {"allow_origin_regex": "https://.*[.]example[.]com"}])  # fmt: skip
async def test_pages_of_allowed_origins(make_service: ServiceFactory, cors: dict):
    """The browser asks in advance, without the key; then with it. It may read errors, and headers of ours."""
    service = await make_service(with_cors(**cors), keys=KEYS)
    allowed = await preflight(service, PAGE)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] in (PAGE, "*")
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    for headers, status in ((BEARER, 200), ({}, 401)):
        answer = await service.http.post("/v1/chat/completions", json=CHAT, headers={**headers, "Origin": PAGE})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
    assert {"X-Rayline-Timing", "Retry-After"} <= set(answer.headers["access-control-expose-headers"].split(", "))


async def test_pages_of_other_origins(make_service: ServiceFactory):
    service = await make_service(with_cors(allow_origins=[PAGE]))
    assert "access-control-allow-origin" not in (await preflight(service, "https://other.example.com")).headers
    assert (await preflight(service, "https://other.example.com")).status_code == 400


@pytest.mark.parametrize(
    "cors",
    [{"allow_origins": ["https://a.example/page"]}, {"allow_origins": ["a.example"]}, {"allow_origin_regex": "("}],
)
def test_what_is_no_origin_is_refused(cors: dict):
    with pytest.raises(ValidationError, match=r"origin|regular expression"):
        with_cors(**cors)


async def test_the_description_is_local_and_open(make_service: ServiceFactory):
    """A browser sends no key with a page: it is entered there, and used for what asks for one."""
    service = await make_service(keys=KEYS)
    page = await service.http.get("/docs")
    assert page.status_code == 200
    loaded = LOADED.findall(page.text)
    assert {address.rpartition("/")[2] for address in loaded} >= {"swagger-ui.css", "swagger-ui-bundle.js", "docs.js"}
    for address in loaded:
        assert address.startswith("static/")
        assert (await service.http.get(f"/{address}")).status_code == 200, address
    described = (await service.http.get("/openapi.json")).json()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert described["paths"]["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in described["paths"]["/health"]["get"]
    without = await make_service()
    assert "securitySchemes" not in (await without.http.get("/openapi.json")).json()["components"]
