from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.runtime.config import Config, ConfigError, DraftConfig, NatsConfig, TargetConfig, dump, load


def refused(file: Path | None = None, environ: dict[str, str] | None = None, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {}, overrides)
    return str(caught.value)


def test_nothing_given_is_the_defaults_with_absolute_paths() -> None:
    config = load(None, {}, [])
    assert config.router.listen == "127.0.0.1:7411"
    assert config.nats == NatsConfig()
    assert config.data_dir == Path.cwd() / ".countersign"
    assert config.target.model.is_absolute()


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "countersign.toml"
    file.write_text("[draft]\ntokens = 2\nthreads = 2\ncache_tokens = 2\n")
    environ = {"COUNTERSIGN_DRAFT__TOKENS": "3", "COUNTERSIGN_DRAFT__THREADS": "3", "HOME": "/"}
    draft = load(file, environ, ["draft.tokens=4"]).draft
    assert (draft.tokens, draft.threads, draft.cache_tokens) == (4, 3, 2)


def test_texts_become_the_types_of_their_keys() -> None:
    config = load(None, {"COUNTERSIGN_DATA_DIR": "/data"}, ["target.kv_store=false", "nats.commit_retention_s=2.5"])
    assert config.data_dir == Path("/data")
    assert config.target.kv_store is False
    assert config.nats.commit_retention_s == 2.5


def test_an_unknown_key_is_refused_with_the_nearest_right_one(tmp_path: Path) -> None:
    file = tmp_path / "countersign.toml"
    file.write_text("[target]\ndtpye = 'bf16'\n")
    assert refused(file) == f"{file}: unknown key target.dtpye (did you mean target.dtype?)"


def test_an_unknown_section_is_refused_with_the_nearest_right_one() -> None:
    text = refused(environ={"COUNTERSIGN_TRAGET__DTYPE": "bf16"})
    assert text == "environment variable COUNTERSIGN_TRAGET__DTYPE: unknown key traget (did you mean target?)"


def test_a_key_like_no_other_is_refused_with_the_keys_there_are() -> None:
    text = refused(overrides=("kv.zzz=1",))
    known = "kv.listen, kv.ram_bytes, kv.disk_bytes, kv.eviction, kv.peers"
    assert text == f"--set kv.zzz=1: unknown key kv.zzz (known are {known})"


@pytest.mark.parametrize(
    ("flag", "rule"),
    [
        ("draft.tokens=0", "an integer from 1 to 64"),
        ("draft.tokens=many", "an integer from 1 to 64"),
        ("draft.threads=1.5", "an integer, 1 or more"),
        ("draft.enabled=maybe", "true or false"),
        ("target.dtype=fp16", "fp32 or bf16"),
        ("target.model=", "a folder"),
        ("nats.port=65536", "a port, 0 to 65535"),
        ("nats.commit_retention_s=nan", "a number of seconds, more than 0, at most 1e9"),
        ("nats.commit_retention_s=inf", "a number of seconds, more than 0, at most 1e9"),
        ("nats.url=localhost", "nats://host:port, more of them after commas, or empty for a server of our own"),
        ("router.listen=7411", "host:port such as 127.0.0.1:7411 or [::1]:7411, port 0 for a free one"),
        ("router.max_timeout_ms=0", "milliseconds, from 1 to 4294967295"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_allowed(flag: str, rule: str) -> None:
    key, _, value = flag.partition("=")
    assert refused(overrides=(flag,)) == f"--set {flag}: {key} = {value!r}: must be {rule}"


def test_the_source_of_a_wrong_value_is_the_one_that_won(tmp_path: Path) -> None:
    file = tmp_path / "countersign.toml"
    file.write_text("[draft]\ntokens = 4\n")
    text = refused(file, {"COUNTERSIGN_DRAFT__TOKENS": "-1"})
    assert text.startswith("environment variable COUNTERSIGN_DRAFT__TOKENS: draft.tokens = '-1'")


def test_a_value_where_a_section_belongs_is_refused() -> None:
    assert refused(overrides=("nats=4222",)) == "--set nats=4222: nats = '4222': expected a table of keys"


def test_a_flag_without_value_is_refused() -> None:
    assert refused(overrides=("draft.tokens",)).startswith("--set draft.tokens: expected key=value")


def test_a_file_that_is_missing_or_no_toml_is_refused_by_name(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[draft\n")
    assert refused(broken).startswith(f"{broken} is not valid TOML")


def test_a_model_folder_is_found_here_first_then_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = load(None, {}, ["target.model=services/runtime"]).target.model
    assert checkout.is_dir()
    monkeypatch.chdir(tmp_path)
    assert load(None, {}, ["target.model=services/runtime"]).target.model == checkout
    (tmp_path / "services" / "runtime").mkdir(parents=True)
    assert load(None, {}, ["target.model=services/runtime"]).target.model == tmp_path / "services" / "runtime"


def test_what_dump_writes_is_final_so_that_a_child_sees_what_its_parent_resolved(tmp_path: Path) -> None:
    config = load(None, {"COUNTERSIGN_DRAFT__TOKENS": "3"}, ["draft.tokens=4"])
    file = tmp_path / "resolved"
    file.write_text(dump(config))
    assert load(file, {"COUNTERSIGN_DRAFT__TOKENS": "3"}, []) == config


@given(
    tokens=st.integers(1, 64),
    retention=st.floats(1e-3, 1e9),
    enabled=st.booleans(),
    folder=st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20),
)
def test_load_reads_back_what_dump_wrote(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, retention: float, enabled: bool, folder: str
) -> None:
    root = tmp_path_factory.getbasetemp()
    config = Config(
        data_dir=root / folder,
        nats=NatsConfig(url="nats://127.0.0.1:4222", commit_retention_s=retention),
        draft=DraftConfig(tokens=tokens, enabled=enabled, model=root / folder),
        target=TargetConfig(model=root),
    )
    file = root / "resolved.json"
    file.write_text(dump(config))
    loaded = load(file, {}, [])
    assert (loaded.draft, loaded.nats, loaded.target, loaded.data_dir) == (
        config.draft,
        config.nats,
        config.target,
        config.data_dir,
    )
