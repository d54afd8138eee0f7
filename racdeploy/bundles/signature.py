"""Signatures over every file of a bundle, in OpenSSF's form for models; model-signing makes them.

A signature lists each file of the folder with its hash, also those that the manifest does not name.
So a file that was added is found as one that was changed. Whose signature it is, its reader must
say: a public key, or an identity that sigstore has seen.
Source: OpenSSF model signing 1.0; model-signing 1.1. This is the only place that imports it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.bundles.hub.layout import refuse_name
from racdeploy.errors import ArtifactError, EnvironmentFailure, UsageError
from racdeploy.manifest import Manifest
from racdeploy.plugins import require
from racdeploy.runtime.loading import refuse_unlisted
from racdeploy.storage.files import file_sha256, write_atomic
from racdeploy.storage.reading import read_bytes, refusing

SIGNATURE_NAME = "model.sig"
_MOST_BYTES = 4_000_000
_SAID = 300
# Of a working copy and not of the bundle: nothing of it is read, so nobody signs it.
_GIT = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
_MOST_NAMES = 3
_METHOD = "files, sha256"  # what model-signing can also hash: pieces of files, and with BLAKE
_NEW_COPY = "get bundle and signature again from their source; do not use this copy"
_PUBLIC_KEY = "openssl ec -in key.pem -pubout -out key.pub makes the public one of a private key"
_PRIVATE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem makes one"


@dataclass(frozen=True)
class Signatory:
    """Who must have signed: a public key's owner, or an identity that an issuer vouches for.

    Args:
        public_key: PEM file; None where the identity counts.
        identity: e-mail address or workflow, as the certificate of sigstore names it.
        issuer: the OpenID provider of that identity.
    """

    public_key: Path | None = None
    identity: str = ""
    issuer: str = ""

    def __str__(self) -> str:
        return str(self.public_key) if self.public_key else f"{self.identity} of {self.issuer}"


def sign(bundle: Path, signature: Path | None = None, key: Path | None = None) -> Path:
    """Sign every file of a bundle that is as its manifest says; return the signature's file.

    Args:
        signature: file to write; None is :data:`SIGNATURE_NAME` in the bundle.
        key: PEM file of a private key on P-256, P-384 or P-521; None signs with the identity of
            this job, or of whoever logs in, at sigstore, whose public log will have it.

    Raises:
        ArtifactError: the bundle is damaged, or has a file that could not be published.
        UsageError: the key cannot sign.
        EnvironmentFailure: sigstore cannot be reached, or refuses.
    """
    _require()
    manifest = Manifest.read(bundle)
    manifest.check_files(bundle)
    refuse_unlisted(bundle, manifest)

    place = signature or bundle / SIGNATURE_NAME
    if place.is_dir():
        raise UsageError(f"{place} is a folder", remedy="name a file with --signature")
    for name in _list_files(bundle):
        if reason := refuse_name(name):
            raise ArtifactError(
                f"{bundle / name} would be signed and never pushed: its name {reason}",
                remedy="remove or rename it first",
            )

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / SIGNATURE_NAME
        with contextlib.nullcontext() if key else _reaching_sigstore():
            config = _open_signer(key).set_hashing_config(_leave_out(bundle, place))
            config.sign(bundle.resolve(), written)
        write_atomic(place, written.read_bytes())
    return place


def check_signature(bundle: Path, signature: Path, signatory: Signatory) -> None:
    """Compare every file of a bundle with a signature, before any of them is used.

    Raises:
        ArtifactError: a file was changed, added or removed, or the signature is another's, damaged
            or leaves a file out.
        UsageError: the public key is none.
        EnvironmentFailure: sigstore's roots cannot be had.
    """
    _require()
    if not bundle.is_dir():
        raise ArtifactError(f"there is no folder {bundle}")
    if not signature.is_file():
        raise ArtifactError(
            f"there is no signature {signature}",
            remedy="name it with --signature; racdeploy sign makes one",
        )

    content = read_bytes(signature, _MOST_BYTES)
    for _ in _list_files(bundle):
        pass  # links and devices end it before anything is hashed
    config = _open_verifier(signatory).set_hashing_config(_leave_out(bundle, signature))

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / SIGNATURE_NAME  # what was read, whatever comes to lie there
        copy.write_bytes(content)
        with _explaining(signature, signatory), contextlib.redirect_stdout(sys.stderr):
            is_same = _compare(config, bundle, copy)

    # Of the signatory, from here on: what it says of files is true.
    with refusing(signature, _NEW_COPY):
        statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))
        _refuse_exceptions(statement, bundle, signature)
    if not is_same:
        raise _refuse_files(statement, bundle, signature)


def _require() -> None:
    for module in ("model_signing", "OpenSSL"):
        require(module)


def _list_files(bundle: Path) -> Iterator[str]:
    """Yield the files that a signature is over; what is neither file nor folder is refused."""
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                f"{path} is a link or no file, and a signature is over files alone",
                remedy="copy the bundle again, as files",
            )
        if path.is_file() and name.partition("/")[0] not in _GIT:
            yield name


def _list_signatures(bundle: Path, signature: Path) -> set[str]:
    """Return where a signature may lie in the bundle, which it cannot be over."""
    place, folder = signature.resolve(), bundle.resolve()
    inside = {place.relative_to(folder).as_posix()} if place.is_relative_to(folder) else set()
    return {SIGNATURE_NAME, *inside}


def _leave_out(bundle: Path, signature: Path) -> Any:
    """Return what is hashed: every file but signatures and git's own."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=sorted(_list_signatures(bundle, signature)))


def _open_signer(key: Path | None) -> Any:
    from model_signing import signing

    config = signing.Config()
    if key is None:
        return config.use_sigstore_signer(use_ambient_credentials=True)

    content = _read_key(key)
    try:
        with refusing(key):
            return config.use_elliptic_key_signer(private_key=key)
    except ArtifactError as error:
        kind = "an encrypted private key" if b"ENCRYPTED" in content else "no private key"
        raise UsageError(
            f"{key} is {kind} on P-256, P-384 or P-521", remedy=_PRIVATE_KEY
        ) from error


def _open_verifier(signatory: Signatory) -> Any:
    from model_signing import verifying

    config = verifying.Config()
    if signatory.public_key is None:
        with _reaching_sigstore():
            return config.use_sigstore_verifier(
                identity=signatory.identity, oidc_issuer=signatory.issuer
            )

    _read_key(signatory.public_key)
    try:
        with refusing(signatory.public_key):
            return config.use_elliptic_key_verifier(public_key=signatory.public_key)
    except ArtifactError as error:
        raise UsageError(
            f"{signatory.public_key} is no public key on P-256, P-384 or P-521", remedy=_PUBLIC_KEY
        ) from error


def _read_key(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError(f"there is no key {file}", remedy=_PRIVATE_KEY)
    return read_bytes(file)


@contextlib.contextmanager
def _reaching_sigstore() -> Iterator[None]:
    """Turn what sigstore's client raises into an error of the machine."""
    try:
        with refusing("what sigstore answers"):
            yield
    except (ArtifactError, OSError) as error:  # those of the network are OSErrors
        cause = " ".join(str(error.__cause__ or error).split())[:_SAID]
        raise EnvironmentFailure(
            f"sigstore cannot be used: {cause}",
            remedy="it needs the network, and in a workflow the permission id-token: write; a key "
            "needs neither: --key, or --public-key",
        ) from error


@contextlib.contextmanager
def _explaining(signature: Path, signatory: Signatory) -> Iterator[None]:
    """Turn what model-signing raises about a signature into one line."""
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import VerificationError

    other = ArtifactError(f"{signature} was not made by {signatory}", remedy=_NEW_COPY)
    with refusing(signature, _NEW_COPY):
        try:
            yield
        except (InvalidSignature, VerificationError) as error:
            raise other from error
        except ValueError as error:
            if str(error).startswith("Key mismatch"):
                raise other from error
            raise


def _compare(config: Any, bundle: Path, signature: Path) -> bool:
    """Return whether the files are those of a signature, which is genuine where this returns."""
    try:
        config.verify(bundle.resolve(), signature)  # a link to a bundle is the user's own
    except ValueError as error:
        if not str(error).startswith("Signature mismatch: "):
            raise
        return False
    return True


def _refuse_exceptions(statement: Mapping[str, Any], bundle: Path, signature: Path) -> None:
    """Refuse a genuine signature that was told to leave out files of the bundle."""
    left_out = statement.get("predicate", {}).get("serialization", {}).get("ignore_paths", [])
    allowed = _GIT | _list_signatures(bundle, signature)
    if others := {str(name) for name in left_out} - allowed:
        raise ArtifactError(
            f"{signature} leaves out files of {bundle}: {_name_some(others)}",
            remedy="ask for a signature over the whole folder: racdeploy sign",
        )


def _refuse_files(statement: Mapping[str, Any], bundle: Path, signature: Path) -> ArtifactError:
    """Return the error that names what was added, removed and changed since the signature."""
    predicate = statement.get("predicate", {})
    made = predicate.get("serialization", {})
    method = f"{made.get('method')}, {made.get('hash_type')}"
    if method != _METHOD:
        return ArtifactError(
            f"{signature} is over {method[:_SAID]}, and compared are {_METHOD}",
            remedy="ask for a signature that racdeploy sign makes",
        )

    resources = predicate.get("resources", [])
    hashes = {entry["name"]: entry["digest"] for entry in resources}
    there = set(_list_files(bundle)) - _list_signatures(bundle, signature)

    both = there & set(hashes)
    found = {
        "added": there - set(hashes),
        "removed": set(hashes) - there,
        "changed": {name for name in both if file_sha256(bundle / name) != hashes[name]},
    }
    told = [f"{what}: {_name_some(names)}" for what, names in found.items() if names]
    return ArtifactError(
        f"{bundle} is not what {signature} signs: {'; '.join(told)}", remedy=_NEW_COPY
    )


def _name_some(names: set[str]) -> str:
    some = sorted(names)
    more = [f"and {len(some) - _MOST_NAMES} more"] if len(some) > _MOST_NAMES else []
    return ", ".join([name[:_SAID] for name in some[:_MOST_NAMES]] + more)
