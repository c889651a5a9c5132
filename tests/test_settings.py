"""Where each setting comes from, and what is said of every mistake."""

from collections.abc import Callable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import attrs
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from vllmproxy.settings import Secret, Settings, SettingsError, load
from vllmproxy.settings_kinds import FLAG
from vllmproxy.settings_table import TABLE, Row
from vllmproxy.store.opening import make_store
from vllmproxy.upstreams.upstream import Upstream

URL = "http://gpu1:8000"
BASE = {"upstream": URL}
HOME = {"HOME": "/home/ann"}


def files(contents: Mapping[str, str | Exception]) -> Callable[[Path], str]:
    """Return a ``read_file`` that knows just those files."""

    def read_file(path: Path) -> str:
        content = contents.get(str(path), FileNotFoundError(2, "No such file or directory"))
        if isinstance(content, Exception):
            raise content
        return content

    return read_file


def settings(
    options: Mapping[str, object] = BASE,
    environ: Mapping[str, str] = HOME,
    contents: Mapping[str, str | Exception] | None = None,
) -> Settings:
    return load(options, environ, files(contents or {}))


def with_toml(text: str, options: Mapping[str, object] = BASE, **environ: str) -> Settings:
    return settings({**options, "config": "/c.toml"}, {**HOME, **environ}, {"/c.toml": text})


def test_every_row_of_the_table_is_a_field_and_every_field_a_row() -> None:
    assert {row.field for row in TABLE.values()} == set(attrs.fields_dict(Settings))


def test_defaults() -> None:
    expected = Settings(
        upstream=Upstream.parse(URL),
        upstream_key=None,
        upstream_ca=None,
        listen=("tcp:4000:interface=127.0.0.1",),
        store="sqlite:vllmproxy.sqlite",
        state_directory=Path("/home/ann/.local/state/vllmproxy"),
        master_key=None,
        access_log="-",
        open=False,
        simulate=False,
        trusted_proxy=(),
        open_metrics=False,
        connect_timeout=5.0,
        head_timeout=10.0,
        idle_timeout=75.0,
        body_timeout=60.0,
        min_body_rate=100,
        first_byte_timeout=600.0,
        first_byte_timeout_for=(),
        between_bytes_timeout=600.0,
        total_timeout=0.0,
        tunnel_idle_timeout=600.0,
        upstream_idle_timeout=2.5,
        write_timeout=60.0,
        workers=1,
        max_connections=None,
        max_connections_per_client=0,
        max_requests=0,
        max_requests_per_client=0,
        max_waiting=100,
        waiting_timeout=30.0,
        max_head=65536,
        max_headers=128,
        max_target=16384,
        max_body=1 << 30,
        max_api_body=1048576,
        max_held_api_bodies=33554432,
        max_inspected_body=33554432,
        max_held_bodies=536870912,
        prices=None,
        budget_status=422,
        usage="auto",
        cut_revoked=False,
        key_cache_ttl=1.0,
        key_max_stale=300.0,
        store_outage="closed",
        local_share=0.5,
        drain_delay=0.0,
        drain_timeout=30.0,
    )
    assert settings() == expected


#: For each kind of source: a value in it, and what the setting is when that source is the one that counts.
_SOURCES = {
    "upstream": (["http://option", "http://environment", "http://file"], Upstream.parse),
    "store": (["sqlite:/option", "sqlite:/environment", "sqlite:/file"], str),
    "listen": (["tcp:1", "tcp:2", "tcp:3"], lambda text: (text,)),
    "state-directory": (["/option", "/environment", "/file"], Path),
}


@given(st.sampled_from(sorted(_SOURCES)), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.booleans())
def test_option_before_environment_before_file_before_default(
    name: str, given_by: tuple[bool, bool, bool], blank: bool
) -> None:
    texts, convert = _SOURCES[name]
    row = TABLE[name]
    options: dict[str, object] = {"config": "/c.toml"}
    environ = dict(HOME)
    toml = ""
    if given_by[0]:
        options[name] = [texts[0]] if row.repeatable else texts[0]
    if given_by[1]:
        environ[row.environment[0]] = texts[1]
    elif blank:
        environ[row.environment[0]] = ""
    if given_by[2]:
        toml = f'{name} = "{texts[2]}"'
    if name != "upstream":
        options["upstream"] = URL
    elif not any(given_by):
        options["simulate"] = True
    result = getattr(load(options, environ, files({"/c.toml": toml})), row.field)
    first = next((text for text, there in zip(texts, given_by, strict=True) if there), None)
    default = None if name == "upstream" else getattr(settings(), row.field)
    assert result == (default if first is None else convert(first))


@pytest.mark.parametrize("name", ["upstream", "store", "master-key-file"])
def test_environment_names_count_in_their_order(name: str) -> None:
    names = TABLE[name].environment
    value = {"upstream": "http://h{}", "store": "sqlite:{}", "master-key-file": "key{}"}[name]
    options = {} if name == "upstream" else BASE
    for index in range(len(names)):
        environ = {variable: value.format(n) for n, variable in enumerate(names) if n >= index}
        blank = dict.fromkeys(names[:index], "")
        result = getattr(settings(options, {**HOME, **environ, **blank}), TABLE[name].field)
        shown = result.name if name == "upstream" else result.reveal() if name == "master-key-file" else result
        assert shown == value.format(index)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, "/var/lib/a"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/x", **HOME}, "/x/vllmproxy"),
        ({"XDG_STATE_HOME": "relative", **HOME}, "/home/ann/.local/state/vllmproxy"),
        ({"STATE_DIRECTORY": "relative"}, "relative"),
    ],
)
def test_state_directory_and_the_store_in_it(environ: Mapping[str, str], expected: str) -> None:
    result = settings(environ=environ)
    assert result.state_directory == Path(expected)
    store: Any = make_store(result.store, reactor=Clock(), state_directory=result.state_directory)
    assert store._path == Path.cwd() / expected / "vllmproxy.sqlite"


def test_repeatables() -> None:
    several = {**BASE, "listen": ["tcp:1", "unix:/s"], "trusted-proxy": ["10.0.0.0/8", "::1"]}
    result = settings(several)
    assert result.listen == ("tcp:1", "unix:/s")
    assert result.trusted_proxy == (ip_network("10.0.0.0/8"), ip_network("::1/128"))
    assert settings(environ={**HOME, "VLLMPROXY_LISTEN": " tcp:1  unix:/s "}).listen == ("tcp:1", "unix:/s")
    assert with_toml('listen = ["tcp:1", "unix:/s"]').listen == ("tcp:1", "unix:/s")
    assert with_toml("listen = []").listen == settings().listen


def test_toml_takes_the_same_names() -> None:
    result = with_toml(
        "open = true\nopen-metrics = false\nconnect-timeout = 2\nhead-timeout = 2.5\nmax-head = 7\n"
        'trusted-proxy = ["10.0.0.0/8"]\naccess-log = "/a.log"\nkey-cache-ttl = 0'
    )
    assert (result.open, result.open_metrics, result.access_log) == (True, False, "/a.log")
    assert (result.connect_timeout, result.head_timeout, result.max_head) == (2.0, 2.5, 7)
    assert (result.trusted_proxy, result.key_cache_ttl) == ((ip_network("10.0.0.0/8"),), 0.0)


_SECRETS = {"/option": "from-option\n", "/file": "from-file\r\n", "/credentials/master-key": "from-systemd\n"}


@pytest.mark.parametrize(
    ("option", "environ", "toml", "expected"),
    [
        (True, True, True, "from-option"),
        (False, True, True, "from-environment"),
        (False, False, True, "from-file"),
        (False, False, False, "from-systemd"),
    ],
)
def test_master_key_sources(option: bool, environ: bool, toml: bool, expected: str) -> None:
    options = {**BASE, "config": "/c.toml"} | ({"master-key-file": "/option"} if option else {})
    variables = {**HOME, "CREDENTIALS_DIRECTORY": "/credentials"}
    if environ:
        variables["LITELLM_MASTER_KEY"] = "from-environment"
    text = 'master-key-file = "/file"' if toml else ""
    result = settings(options, variables, {**_SECRETS, "/c.toml": text})
    assert result.master_key == Secret(expected)


def test_a_credentials_directory_without_a_master_key_says_nothing() -> None:
    result = settings(environ={**HOME, "CREDENTIALS_DIRECTORY": "/elsewhere"}, contents=_SECRETS)
    assert result.master_key is None
    assert result.upstream_key is None


def test_nothing_secret_is_in_the_repr() -> None:
    environ = {**HOME, "VLLMPROXY_MASTER_KEY": "hunter2", "VLLM_API_KEY": "hunter2"}
    result = settings({**BASE, "store": "redis://:hunter2@h"}, environ)
    assert result.master_key is not None
    assert result.master_key.reveal() == "hunter2"
    assert "hunter2" not in repr(result)
    assert "hunter2" not in str(result.master_key)


def test_of_upstream_and_simulator_the_one_said_more_directly_counts() -> None:
    by_option = settings({"simulate": True}, {**HOME, "HOSTED_VLLM_API_BASE": URL})
    assert (by_option.simulate, by_option.upstream) == (True, None)
    by_environment = with_toml("simulate = true", {}, VLLM_API_BASE=URL)
    assert (by_environment.simulate, by_environment.upstream) == (False, Upstream.parse(URL))
    assert with_toml(f'simulate = false\nupstream = "{URL}"', {}).upstream == Upstream.parse(URL)


@pytest.mark.parametrize(
    "text",
    [
        "tcp:0",
        "tcp:4000",
        "tcp:port=4000",
        "tcp:4000:interface=\\:\\:1",
        "tcp6:4000",
        "unix:/a b:mode=660",
        "ssl:443:privateKey=/absent.pem",
        "tls:/absent:port=443",
        "systemd:domain=INET:index=0",
    ],
)
def test_endpoints_are_taken_as_written(text: str) -> None:
    assert settings({**BASE, "listen": [text]}).listen == (text,)


@pytest.mark.parametrize(
    "text", ["memory:", "sqlite:a.db", "redis://h", "rediss://u:p@h:1/0", "unix:///r.sock", "redis+sentinel://h,h/m"]
)
def test_stores_are_taken_as_written(text: str) -> None:
    assert settings({**BASE, "store": text}).store == text


_PREFIXES = ("max-", "key-", "local-", "drain-", "min-")
_NUMBERS = [name for name in TABLE if name.startswith(_PREFIXES) or name.endswith("-timeout")]


@pytest.mark.parametrize("name", _NUMBERS)
@pytest.mark.parametrize("text", ["", "-1", "x", "nan", "inf", "1e999", "5s"])
def test_bad_numbers(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"^--{name}: [^\n]+; [^\n]+$"):
        settings({**BASE, name: text})


_OFF = {
    *("between-bytes-timeout", "total-timeout", "tunnel-idle-timeout", "min-body-rate", "max-waiting"),
    *("max-connections-per-client", "max-requests", "max-requests-per-client", "max-body"),
}


@pytest.mark.parametrize(
    "name", [name for name in _NUMBERS if not name.startswith(("key-", "drain-")) and name not in _OFF]
)
def test_zero_is_no_limit(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^--{name}: "):
        settings({**BASE, name: "0"})


@pytest.mark.parametrize("name", sorted(_OFF))
def test_zero_switches_a_limit_off(name: str) -> None:
    assert getattr(settings({**BASE, name: "0"}), TABLE[name].field) == 0


def test_routes_with_a_time_of_their_own() -> None:
    said = settings({**BASE, "first-byte-timeout-for": ["/vllm/v1/embeddings=30", "/v1/a=b=.5"]})
    assert [(route.text, seconds) for route, seconds in said.first_byte_timeout_for] == [
        ("/v1/embeddings", 30.0),
        ("/v1/a=b", 0.5),
    ]
    assert with_toml('first-byte-timeout-for = "/v1/score=7"').first_byte_timeout_for[0][1] == 7


@pytest.mark.parametrize("text", ["", "30", "/v1/x", "/v1/x=", "/v1/x=0", "v1/x=3", "/v1//x=3", "/v1/%78=3", "=3"])
def test_bad_routes_with_a_time(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--first-byte-timeout-for: [^\n]+$"):
        settings({**BASE, "first-byte-timeout-for": [text]})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, ["--upstream", "VLLMPROXY_UPSTREAM, VLLM_API_BASE or HOSTED_VLLM_API_BASE", "--simulate"]),
        ({**BASE, "simulate": True}, ["--simulate: ", "leave it or --upstream out"]),
        ({"upstream": "gpu1:8000"}, ["--upstream: ", "begins with http://"]),
        ({"upstream": "http://u:hunter2@h"}, ["--upstream: ", "--upstream-key-file"]),
        ({**BASE, "listen": ["tcp:1", "4000"]}, ["--listen: '4000'", "tcp, tcp6, unix, ssl, tls, systemd"]),
        ({**BASE, "listen": ["tcp"]}, ["--listen: 'tcp'", "colon"]),
        ({**BASE, "store-outage": "open"}, ["--store-outage: 'open'", "none of closed, local"]),
        ({**BASE, "local-share": "1.1"}, ["--local-share: 1.1", "up to 1"]),
        ({**BASE, "listen": ["stdio:"]}, ["--listen: 'stdio:'", "begin with"]),
        ({**BASE, "listen": ["tcp:http"]}, ["--listen: 'tcp:http'", "tcp:4000"]),
        ({**BASE, "listen": ["tcp:1:nonsense=2"]}, ["--listen: ", "tcp:4000"]),
        ({**BASE, "listen": ["tcp:1:interface=::1"]}, ["--listen: ", "backslash"]),
        ({**BASE, "listen": ["tcp:1\\"]}, ["--listen: ", "tcp:4000"]),
        ({**BASE, "listen": ["tcp:65536"]}, ["--listen: ", "65536"]),
        ({**BASE, "listen": ["ssl:65536:privateKey=x"]}, ["--listen: ", "65536"]),
        ({**BASE, "listen": ["tcp:interface=x:port=70000"]}, ["--listen: ", "70000"]),
        ({**BASE, "listen": ["tcp:-1"]}, ["--listen: ", "-1"]),
        ({**BASE, "store": "postgres://u:hunter2@h"}, ["--store: ", "memory:, sqlite:PATH"]),
        ({**BASE, "store": "sqlite:"}, ["--store: ", "sqlite:PATH"]),
        ({**BASE, "store": "redis://:hunter2@h:port"}, ["--store: ", "port"]),
        ({**BASE, "store": "redis:"}, ["--store: "]),
        ({**BASE, "store": "memory:x"}, ["--store: ", "memory:"]),
        ({**BASE, "trusted-proxy": ["10.0.0.1/8"]}, ["--trusted-proxy: ", "10.0.0.1/8", "10.0.0.0/8"]),
        ({**BASE, "trusted-proxy": ["example.com"]}, ["--trusted-proxy: ", "example.com"]),
        ({**BASE, "access-log": ""}, ["--access-log: ", "empty"]),
        ({**BASE, "prices": ""}, ["--prices: the name is empty"]),
        ({**BASE, "upstream-ca": ""}, ["--upstream-ca: the name is empty"]),
        ({**BASE, "state-directory": ""}, ["--state-directory: ", "empty"]),
        ({**BASE, "master-key-file": "/absent"}, ["--master-key-file: ", "'/absent'", "No such file"]),
        ({**BASE, "master-key-file": "/denied"}, ["--master-key-file: ", "'/denied'", "Permission denied"]),
        ({**BASE, "master-key-file": "/binary"}, ["--master-key-file: ", "'/binary'", "UTF-8"]),
        ({**BASE, "master-key-file": "/empty"}, ["--master-key-file: '/empty': ", "empty"]),
        ({**BASE, "upstream-key-file": "/two"}, ["--upstream-key-file: '/two': ", "one line"]),
        ({**BASE, "config": "/absent"}, ["--config: ", "'/absent'", "No such file"]),
        ({**BASE, "config": "/two"}, ["--config: '/two' is not TOML", "line 1"]),
    ],
)
def test_mistakes_in_options(options: Mapping[str, object], says: list[str]) -> None:
    contents: dict[str, str | Exception] = {
        "/denied": PermissionError(13, "Permission denied"),
        "/binary": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        "/empty": "\n",
        "/two": "hunter2 a\nb\n",
    }
    with pytest.raises(SettingsError) as caught:
        settings(options, HOME, contents)
    sentence = str(caught.value)
    assert [text for text in says if text not in sentence] == []
    assert "hunter2" not in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('max_head = "x"', "sets 'max_head', which does not exist; did you mean 'max-head'?"),
        ('lisen = "tcp:1"', "did you mean 'listen'?"),
        ("[vllmproxyyy]", "use the options' names"),
        ('master-key = "hunter2"', "did you mean 'master-key-file'?"),
        ('open = "yes"', "open in '/c.toml': this has to be true or false"),
        ("max-head = true", "max-head in '/c.toml': this has to be a whole number"),
        ("max-head = 1.5", "max-head in '/c.toml': this has to be a whole number"),
        ('connect-timeout = "5"', "connect-timeout in '/c.toml': this has to be a number"),
        ("connect-timeout = -5", "connect-timeout in '/c.toml': "),
        ("connect-timeout = inf", "connect-timeout in '/c.toml': "),
        (
            "connect-timeout = 1e-300",
            "connect-timeout in '/c.toml': 1e-300 seconds is too short for anything; give 0.001",
        ),
        ("total-timeout = 0.0009", "total-timeout in '/c.toml': "),
        ('first-byte-timeout-for = "/v1/x=0.0001"', "give 0.001 or more"),
        ("connect-timeout = " + "[" * 100_000, "'/c.toml' nests too deeply, or has a number of"),
        ("max-body = " + "9" * 5000, "'/c.toml' nests too deeply, or has a number of"),
        ("max-body = 0x" + "9" * 5000, "max-body in '/c.toml': this is a number of thousands of digits"),
        ("listen = 4000", "listen in '/c.toml': this has to be a string or a list of strings"),
        ('listen = ["tcp:1", 2]', "listen in '/c.toml': this has to be a string or a list of strings"),
        ('store = ["memory:"]', "store in '/c.toml': this has to be a string"),
        ('store = "mysql:"', "store in '/c.toml': no such store"),
        ('master-key-file = "/absent"', "master-key-file in '/c.toml': cannot read '/absent'"),
    ],
)
def test_mistakes_in_the_file(toml: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        with_toml(toml)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({**HOME, "REDIS_URL": "http://:hunter2@h"}, "environment variable REDIS_URL: no such store"),
        (
            {**HOME, "LITELLM_MASTER_KEY": "hunter2 x"},
            "environment variable LITELLM_MASTER_KEY: the key has to be",
        ),
        ({**HOME, "VLLMPROXY_LISTEN": "4000"}, "environment variable VLLMPROXY_LISTEN: '4000'"),
        ({**HOME, "CREDENTIALS_DIRECTORY": "/e"}, "systemd credential master-key: the key is empty"),
        ({**HOME, "CREDENTIALS_DIRECTORY": "/d"}, "systemd credential master-key: cannot read"),
        ({}, "--state-directory"),
    ],
)
def test_mistakes_in_the_environment(environ: Mapping[str, str], says: str) -> None:
    denied = PermissionError(13, "Permission denied")
    with pytest.raises(SettingsError) as caught:
        settings(BASE, environ, {"/e/master-key": "", "/d/master-key": denied})
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(st.sampled_from([row for row in TABLE.values() if row.kind is not FLAG]), st.text())
def test_any_text_is_taken_or_refused_in_one_line(row: Row, text: str) -> None:
    said = ""
    try:
        settings({**BASE, row.name: [text] if row.repeatable else text})
    except SettingsError as error:
        said = str(error)
    assert said.isprintable()


def test_files_are_really_read(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-disk\n")
    (tmp_path / "c.toml").write_text(f'master-key-file = "{tmp_path}/key"\n')
    result = load({**BASE, "config": str(tmp_path / "c.toml")}, HOME)
    assert result.master_key == Secret("sk-from-disk")


PRICES = '[models."*"]\ninput = 1\n'


def test_prices_are_read_out_of_their_file() -> None:
    files = {"/prices.toml": PRICES}
    read = lambda path: files[str(path)]  # noqa: E731
    loaded = load({"upstream": URL, "prices": "/prices.toml"}, HOME, read)
    assert loaded.prices is not None
    assert loaded.prices.cost("any", 2_000_000, 0, 0, 0) == 2_000_000
    files["/prices.toml"] = "[models.m]\noutput = 1\n"
    with pytest.raises(SettingsError, match=r"--prices: '/prices.toml': the price of 'm' has no input"):
        load({"upstream": URL, "prices": "/prices.toml"}, HOME, read)


@pytest.mark.parametrize(("name", "wrong"), [("usage", "often"), ("budget-status", "200"), ("budget-status", "4o2")])
def test_a_choice_is_one_of_those_that_there_are(name: str, wrong: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name}: .*choose"):
        load({"upstream": URL, name: wrong}, HOME)


def test_authorities_are_read_out_of_their_file() -> None:
    pem = trustme.CA().cert_pem.bytes().decode()
    files = {"/ca.pem": f"# ours\n{pem}"}
    read = lambda path: files[str(path)]  # noqa: E731 (as above)
    loaded = load({"upstream": URL, "upstream-ca": "/ca.pem"}, HOME, read)
    assert loaded.upstream_ca is not None
    assert loaded.upstream_ca.pem == (pem.strip(),)
    for bad, says in (("", "holds no certificate"), (pem.replace("M", "A"), "1 certificates is damaged")):
        files["/ca.pem"] = bad
        with pytest.raises(SettingsError, match=f"--upstream-ca: '/ca.pem': .*{says}"):
            load({"upstream": URL, "upstream-ca": "/ca.pem"}, HOME, read)


# workers


@pytest.mark.parametrize(
    "store", ["redis://h", "rediss://u:p@h:1/2", "unix:///run/redis.sock", "redis+sentinel://a,b/main"]
)
def test_workers_with_a_store_that_they_share(store: str) -> None:
    assert settings({**BASE, "workers": "3", "store": store}).workers == 3


@pytest.mark.parametrize("store", [None, "memory:", "sqlite:keys.sqlite", "sqlite:/p:a/ss"])
def test_workers_with_another_store(store: str | None) -> None:
    options = {} if store is None else {"store": store}
    kind = "memory:" if store == "memory:" else "sqlite:"
    with pytest.raises(SettingsError, match=f"^--workers: 2 processes need .* {kind} is one process's; .*redis://"):
        settings({**BASE, "workers": "2", **options})
    assert settings({**BASE, "workers": "1", **options}).workers == 1


def test_workers_and_a_simulator() -> None:
    with pytest.raises(SettingsError, match=r"^workers in '/c.toml': --simulate is for trying out, in one process"):
        load({"simulate": True, "store": "redis://h", "config": "/c.toml"}, HOME, files({"/c.toml": "workers = 2"}))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "257", ""])
def test_a_number_of_workers_that_is_none(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--workers: [^\n]+; [^\n]+$"):
        settings({**BASE, "workers": text, "store": "redis://h"})
