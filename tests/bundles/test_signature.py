"""``racdeploy sign`` and ``verify --signature``: every file counts, and whose signature it is."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import hashing, signing
from model_signing._cli import main as command
from typer.testing import CliRunner, Result

import racdeploy
from racdeploy import plugins
from racdeploy.bundles.inspect import inspect_path
from racdeploy.bundles.signature import Signer, check_signature, sign
from racdeploy.cli.app import app
from racdeploy.errors import ArtifactError
from tests.support.errors import raises
from tests.support.fake_bundle import make_fake_bundle, read_files
from tests.support.hub_server import WRITES, hub_server, point_at
from tests.support.tiny_artifacts import make_bundle

ROOT = Path(__file__).parents[2]
MAIN = "thinker-1B-rac-v1.0-Q8_0.gguf"
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def _write_keys(folder: Path, name: str, key: ec.EllipticCurvePrivateKey | None = None) -> Signer:
    """Write ``NAME.pem`` and ``NAME.pub``; return whose they are."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(PEM, PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    return Signer(folder / f"{name}.pub")


@pytest.fixture
def author(tmp_path: Path) -> Signer:
    """Whose keys lie as key.pem and key.pub."""
    return _write_keys(tmp_path, "key")


@pytest.fixture
def signed(tmp_path: Path, author: Signer) -> Path:
    bundle = make_fake_bundle(tmp_path / "bundle")
    assert sign(bundle, key=tmp_path / "key.pem") == bundle / "model.sig"
    check_signature(bundle, bundle / "model.sig", author)
    return bundle


def _flip(file: Path, place: int = 100) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1
    file.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a byte of the artifact": (
        lambda b: _flip(b / MAIN),
        "signature-differs",
        f"Hash mismatch for '{MAIN}'",
    ),
    "a byte of the manifest": (
        lambda b: _flip(b / "racdeploy.json"),
        "signature-differs",
        "Hash mismatch for 'racdeploy.json'",
    ),
    "a file that no manifest lists": (
        lambda b: _flip(b / "README.md", 2),
        "signature-differs",
        "Hash mismatch for 'README.md'",
    ),
    "a template that was dropped in": (
        lambda b: (b / "chat_template.jinja").write_text("{{ 1 }}"),
        "signature-differs",
        "Extra files found in model 'bundle': chat_template.jinja",
    ),
    "a file in a folder": (
        lambda b: ((b / "sub").mkdir(), (b / "sub" / "x").touch()),
        "signature-differs",
        "Extra files found in model 'bundle': sub/x",
    ),
    "a hidden file": (
        lambda b: (b / ".x").touch(),
        "signature-differs",
        "Extra files found in model 'bundle': .x",
    ),
    "another signature": (
        lambda b: (b / "x.sig").touch(),
        "signature-differs",
        "Extra files found in model 'bundle': x.sig",
    ),
    "a file less": (
        lambda b: (b / "records.jsonl").unlink(),
        "signature-differs",
        "Missing files in model 'bundle': records.jsonl",
    ),
    "a name": (
        lambda b: (b / "README.md").rename(b / "readme.md"),
        "signature-differs",
        "'bundle': readme.md; Missing files in model 'bundle': README.md",
    ),
    "two files in each other's place": (
        lambda b: shutil.copy(b / "report.json", b / "records.jsonl"),
        "signature-differs",
        "Hash mismatch for 'records.jsonl'",
    ),
    "a link to the same bytes": (
        lambda b: ((b / "README.md").rename(b.parent / "r"), os.symlink("../r", b / "README.md")),
        "link-in-bundle",
        "bundle/README.md",
    ),
    "a link to a folder": (lambda b: os.symlink("..", b / "up"), "link-in-bundle", "bundle/up"),
    "a link that leads nowhere": (lambda b: os.symlink("x", b / "y"), "link-in-bundle", "bundle/y"),
    "a pipe": (lambda b: os.mkfifo(b / "pipe"), "link-in-bundle", "bundle/pipe"),
    "a signature that is a link": (
        lambda b: ((b / "model.sig").rename(b.parent / "s"), os.symlink("../s", b / "model.sig")),
        "link-in-bundle",
        "bundle/model.sig",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_that_changed_is_refused(signed: Path, author: Signer, change: str) -> None:
    """Whatever it is, in one line that names it."""
    spoil, code, complaint = CHANGES[change]
    spoil(signed)
    with raises(code, complaint) as refused:
        check_signature(signed, signed / "model.sig", author)
    assert "\n" not in refused.value.message


def _rewrite(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoil(file: Path) -> None:
        value = json.loads(file.read_text(encoding="utf-8"))
        change(value)
        file.write_text(json.dumps(value), encoding="utf-8")

    return spoil


def _forge_statement(value: dict) -> None:
    """Say that the bundle's card may be left out, under the old signature."""
    statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    statement["predicate"]["serialization"]["ignore_paths"].append("README.md")
    forged = json.dumps(statement).encode()
    value["dsseEnvelope"]["payload"] = base64.b64encode(forged).decode()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "not JSON": lambda f: f.write_bytes(b"{"),
    "not text": lambda f: f.write_bytes(b"\xff\xfe"),
    "a list": lambda f: f.write_bytes(b"[]"),
    "an object": lambda f: f.write_bytes(b"{}"),
    "half": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "deep": lambda f: f.write_bytes(b"[" * 200_000),
    "large": lambda f: f.write_bytes(bytes(5_000_000)),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "a changed signature": _rewrite(
        lambda v: v["dsseEnvelope"]["signatures"][0].update(
            sig=base64.b64encode(b"x" * 70).decode()
        )
    ),
    "no signature": _rewrite(lambda v: v["dsseEnvelope"].update(signatures=[])),
    "no envelope": _rewrite(lambda v: v.pop("dsseEnvelope")),
    "no key": _rewrite(lambda v: v["verificationMaterial"].pop("publicKey")),
    "a payload of another kind": _rewrite(lambda v: v["dsseEnvelope"].update(payloadType="x")),
    "another statement": _rewrite(_forge_statement),
    "a number for a payload": _rewrite(lambda v: v["dsseEnvelope"].update(payload=7)),
    "another medium": _rewrite(lambda v: v.update(mediaType="text/plain")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_signature_is_refused(signed: Path, author: Signer, damage: str) -> None:
    """It is one line that names the file, never a traceback."""
    DAMAGES[damage](signed / "model.sig")
    with pytest.raises(ArtifactError, match=r"model\.sig") as refused:
        check_signature(signed, signed / "model.sig", author)
    assert len(str(refused.value)) < 700


def test_a_key_of_somebody_else_is_refused(signed: Path, author: Signer, tmp_path: Path) -> None:
    """Also where the signature claims to be of the key that is asked for."""
    other = _write_keys(tmp_path, "other")
    with raises("signed-by-another", "other.pub"):
        check_signature(signed, signed / "model.sig", other)

    mine = json.loads((signed / "model.sig").read_text())["verificationMaterial"]
    sign(signed, key=tmp_path / "other.pem")
    _rewrite(lambda value: value.update(verificationMaterial=mine))(signed / "model.sig")
    with raises("signed-by-another", "key.pub"):
        check_signature(signed, signed / "model.sig", author)


def test_the_signature_of_another_bundle_is_refused(
    signed: Path, author: Signer, tmp_path: Path
) -> None:
    """It is genuine, and says what it is over."""
    other = make_fake_bundle(tmp_path / "other", "q4_0")
    sign(other, key=tmp_path / "key.pem")
    with raises("signature-differs", "Extra files found in", "Q8_0", "Missing files in", "Q4_0"):
        check_signature(signed, other / "model.sig", author)


def test_a_genuine_signature_that_leaves_files_out_is_refused(
    signed: Path, author: Signer, tmp_path: Path
) -> None:
    """model-signing's own command can ignore paths; git's are the only ones that may be."""
    ignored = hashing.Config().set_ignored_paths(paths=["model.sig", "chat_template.jinja"])
    signer = signing.Config().use_elliptic_key_signer(private_key=tmp_path / "key.pem")
    signer.set_hashing_config(ignored).sign(signed, signed / "model.sig")
    with raises("signature-incomplete", "chat_template.jinja"):
        check_signature(signed, signed / "model.sig", author)


@pytest.mark.parametrize(
    "config",
    [
        hashing.Config().use_file_serialization(hashing_algorithm="blake2"),
        hashing.Config().use_shard_serialization(),
    ],
    ids=["other hashes", "pieces of files"],
)
def test_a_signature_over_something_else_is_refused(
    signed: Path, author: Signer, tmp_path: Path, config: hashing.Config
) -> None:
    """It is genuine, and over no file as racdeploy hashes it."""
    signer = signing.Config().use_elliptic_key_signer(private_key=tmp_path / "key.pem")
    config.set_ignored_paths(paths=["model.sig"])
    signer.set_hashing_config(config).sign(signed, signed / "model.sig")
    with raises("signature-differs", "model.sig"):
        check_signature(signed, signed / "model.sig", author)


def test_other_programs_check_the_same_signature(
    signed: Path, author: Signer, tmp_path: Path
) -> None:
    """model-signing's command takes ours, and its own is taken here."""
    place = ["--signature", signed / "model.sig", signed]
    checked = click.testing.CliRunner().invoke(
        command, ["verify", "key", "--public_key", str(author.public_key), *map(str, place)]
    )
    assert checked.exit_code == 0, checked.output

    (signed / "model.sig").unlink()
    made = click.testing.CliRunner().invoke(
        command, ["sign", "key", "--private_key", str(tmp_path / "key.pem"), *map(str, place)]
    )
    assert made.exit_code == 0, made.output
    check_signature(signed, signed / "model.sig", author)


def test_a_signature_may_lie_elsewhere_and_the_folder_be_renamed(
    signed: Path, author: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is known by its files; git's own files are not among them."""
    (signed / "model.sig").rename(tmp_path / "apart.sig")
    shutil.move(signed, tmp_path / "renamed")
    (tmp_path / "renamed" / ".git").mkdir()
    (tmp_path / "renamed" / ".git" / "config").touch()
    check_signature(tmp_path / "renamed", tmp_path / "apart.sig", author)

    (tmp_path / "link").symlink_to(tmp_path / "renamed")
    check_signature(tmp_path / "link", tmp_path / "apart.sig", author)

    monkeypatch.chdir(tmp_path / "renamed")
    sign(Path(), Path("own.sig"), tmp_path / "key.pem")
    check_signature(tmp_path / "renamed", Path("own.sig"), author)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_longer_keys_sign(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    owner = _write_keys(tmp_path, "long", ec.generate_private_key(curve))
    check_signature(bundle, sign(bundle, key=tmp_path / "long.pem"), owner)
    _flip(bundle / MAIN)
    with raises("signature-differs", "Hash mismatch"):
        check_signature(bundle, bundle / "model.sig", owner)


def test_what_cannot_sign_or_check_is_a_wrong_key(signed: Path, tmp_path: Path) -> None:
    """Another kind of key, the wrong half of a pair, an encrypted one, none."""
    rsa_key = rsa.generate_private_key(65537, 2048)
    secret = serialization.BestAvailableEncryption(b"secret")
    wrong = {
        "rsa.pem": rsa_key.private_bytes(PEM, PKCS8, serialization.NoEncryption()),
        "text.pem": b"hello",
        "locked.pem": ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PKCS8, secret),
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)

    for name in (*wrong, "key.pub", "none.pem"):
        code = "no-signing-key" if name == "none.pem" else "signing-key-unusable"
        with raises(code, name) as refused:
            sign(signed, key=tmp_path / name)
        assert ("encrypted" in refused.value.message) == (name == "locked.pem")

    for name in ("text.pem", "key.pem", "none.pub"):
        code = "no-signing-key" if name == "none.pub" else "signing-key-unusable"
        with raises(code, name):
            check_signature(signed, signed / "model.sig", Signer(tmp_path / name))


def test_a_bundle_that_is_not_whole_is_not_signed(tmp_path: Path, author: Signer) -> None:
    """Nor one with files that no push would publish: its signature would fail after a pull."""
    bundle = make_fake_bundle(tmp_path / "bundle")
    (bundle / ".DS_Store").touch()
    with raises("name-not-publishable", ".DS_Store"):
        sign(bundle, key=tmp_path / "key.pem")

    (bundle / ".DS_Store").unlink()
    _flip(bundle / MAIN)
    with raises("differs-from-manifest", MAIN):
        sign(bundle, key=tmp_path / "key.pem")
    assert not (bundle / "model.sig").exists()


def test_a_signed_bundle_is_pushed_and_pulled_with_its_signature(
    signed: Path, author: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a file of the bundle like any other."""
    with hub_server() as server:
        point_at(server.address, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", WRITES)
        for arguments in (
            ["push", signed, "me/model"],
            ["pull", "me/model", "--out", tmp_path / "pulled"],
        ):
            done = CliRunner().invoke(app, [str(argument) for argument in arguments])
            assert done.exit_code == 0, done.output

    check_signature(tmp_path / "pulled", tmp_path / "pulled" / "model.sig", author)


def test_using_a_bundle_leaves_its_signature_valid(tmp_path: Path, author: Signer) -> None:
    """Loading, answering and looking write nothing into it."""
    bundle = make_bundle(tmp_path)
    sign(bundle, key=tmp_path / "key.pem")
    before = read_files(bundle)

    with racdeploy.load(bundle, threads=1) as model:
        model.generate("How many?", max_new_tokens=4)
    inspect_path(bundle)

    assert read_files(bundle) == before
    check_signature(bundle, bundle / "model.sig", author)


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_follow_each_other(tmp_path: Path, author: Signer) -> None:
    """``sign`` names the next one, whose plan begins with the signature."""
    bundle = make_fake_bundle(tmp_path / "bundle")
    done = _call("sign", bundle, "--key", tmp_path / "key.pem")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{bundle / 'model.sig'}\n"
    assert f"racdeploy verify {bundle} --public-key" in done.stderr

    as_json = _call("sign", bundle, "--key", tmp_path / "key.pem", "--json")
    assert json.loads(as_json.stdout) == {"path": str(bundle / "model.sig")}

    # This bundle has no records: what is said of them comes after the signature.
    done = _call("verify", bundle, "--plan", "--public-key", author.public_key)
    said = f"every file of {bundle} matches the signature of {author.public_key}"
    assert said in " ".join(done.stderr.split())
    assert done.exit_code == 2


@pytest.mark.parametrize("more", [(), ("--exit-zero",), ("--plan",), ("--json",)])
def test_nothing_of_a_bundle_is_read_before_its_signature(
    signed: Path, author: Signer, more: tuple[str, ...]
) -> None:
    """A failing one is exit code 2, whatever is asked: there is no verdict to report only."""
    (signed / "racdeploy.json").write_text("{")
    done = _call("verify", signed, "--public-key", author.public_key, *more)
    assert done.exit_code == 2
    assert f"differs from {signed / 'model.sig'}" in done.output
    assert "not valid JSON" not in done.output


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("sign", ()),
        ("sign", ("--keyless", "--key", "k")),
        ("verify", ("--signature", "s")),
        ("verify", ("--identity", "me")),
        ("verify", ("--issuer", "i")),
        ("verify", ("--public-key", "k", "--issuer", "i")),
        ("verify", ("--public-key", "k", "--identity", "i", "--issuer", "i")),
    ],
)
def test_options_that_do_not_say_whose_it_is_are_refused(
    signed: Path, verb: str, arguments: tuple[str, ...]
) -> None:
    """A signature of anybody proves nothing."""
    done = _call(verb, signed, *arguments)
    assert done.exit_code == 2
    assert "--key" in done.stderr or "--public-key FILE, or --identity" in done.stderr


def test_a_missing_signature_is_an_error(signed: Path, author: Signer) -> None:
    (signed / "model.sig").unlink()
    done = _call("verify", signed, "--public-key", author.public_key)
    assert done.exit_code == 2
    assert "there is no signature" in done.stderr


def test_sigstore_out_of_reach_is_an_error_of_the_machine(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its roots come over the network: here every connection is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    before = (signed / "model.sig").read_bytes()
    with raises("sigstore-failed"):
        sign(signed)
    with raises("sigstore-failed"):
        check_signature(signed, signed / "model.sig", Signer(None, "me@x", "https://issuer"))
    assert (signed / "model.sig").read_bytes() == before


def test_without_the_package_the_extra_is_named(
    signed: Path, author: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both packages, and nothing else imports them."""
    for missing in ("model_signing", "OpenSSL"):
        monkeypatch.setattr(plugins, "is_installed", lambda module, no=missing: module != no)
        with raises("missing-extra", "racdeploy[sign]"):
            check_signature(signed, signed / "model.sig", author)

    sources = (ROOT / "racdeploy").rglob("*.py")
    users = [file.name for file in sources if "from model_signing" in file.read_text("utf-8")]
    assert users == ["signature.py"]
