"""Signatures over every file of a bundle, in OpenSSF's form for models; model-signing makes them.

A signature lists each file of the folder with its hash, also those that the manifest does not name.
So a file that was added is found as one that was changed. Whose signature it is, its reader must
say: a public key, or an identity that sigstore has seen.
Source: OpenSSF model signing 1.0; model-signing 1.1. This is the only place that imports it.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.bundles.hub.layout import refuse_name
from racdeploy.errors import ArtifactError, EnvironmentFailure, UsageError
from racdeploy.files.reading import read_bytes, refusing
from racdeploy.files.writing import write_atomic
from racdeploy.manifest import Manifest
from racdeploy.plugins import require
from racdeploy.runtime.loading import refuse_unlisted

SIGNATURE_NAME = "model.sig"
_MOST_BYTES = 4_000_000
_SAID = 300
# Of a working copy and not of the bundle: nothing of it is read, so nobody signs it.
_GIT = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
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
    require("model_signing")
    require("OpenSSL")
    manifest = Manifest.read(bundle)
    manifest.check_files(bundle)
    refuse_unlisted(bundle, manifest)

    place = signature or bundle / SIGNATURE_NAME
    if place.is_dir():
        raise UsageError(
            "signature-is-folder", f"{place} is a folder", remedy="name a file with --signature"
        )
    for name in _list_files(bundle):
        if reason := refuse_name(name):
            raise ArtifactError(
                "name-not-publishable",
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
    require("model_signing")
    require("OpenSSL")
    if not bundle.is_dir():
        raise ArtifactError("no-such-folder", f"there is no folder {bundle}")
    if not signature.is_file():
        raise ArtifactError(
            "no-signature",
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
        with _explaining(bundle, signature, signatory), contextlib.redirect_stdout(sys.stderr):
            config.verify(bundle.resolve(), copy)  # a link to a bundle is the user's own

    # Of the signatory, from here on, who may have left out files of the bundle.
    with refusing(signature, _NEW_COPY):
        statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))
        made = statement.get("predicate", {}).get("serialization", {})
        left_out = {str(name) for name in made.get("ignore_paths", [])}
    if others := left_out - _GIT - _list_signatures(bundle, signature):
        raise ArtifactError(
            "signature-incomplete",
            f"{signature} leaves out files of {bundle}: {', '.join(sorted(others))[:_SAID]}",
            remedy="ask for a signature over the whole folder: racdeploy sign",
        )


def _list_files(bundle: Path) -> Iterator[str]:
    """Yield the files that a signature is over; what is neither file nor folder is refused."""
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                "link-in-bundle",
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
            "signing-key-unusable", f"{key} is {kind} on P-256, P-384 or P-521", remedy=_PRIVATE_KEY
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
            "signing-key-unusable",
            f"{signatory.public_key} is no public key on P-256, P-384 or P-521",
            remedy=_PUBLIC_KEY,
        ) from error


def _read_key(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError("no-signing-key", f"there is no key {file}", remedy=_PRIVATE_KEY)
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
            "sigstore-failed",
            f"sigstore cannot be used: {cause}",
            remedy="it needs the network, and in a workflow the permission id-token: write; a key "
            "needs neither: --key, or --public-key",
        ) from error


@contextlib.contextmanager
def _explaining(bundle: Path, signature: Path, signatory: Signatory) -> Iterator[None]:
    """Turn what model-signing raises about a signature into one line."""
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import VerificationError

    other = ArtifactError(
        "signed-by-another", f"{signature} was not made by {signatory}", remedy=_NEW_COPY
    )
    with refusing(signature, _NEW_COPY):
        try:
            yield
        except (InvalidSignature, VerificationError) as error:
            raise other from error
        except ValueError as error:
            kind, _, differences = str(error).partition(": ")
            if kind == "Key mismatch":
                raise other from error
            if kind == "Signature mismatch":
                found = ast.literal_eval(differences)  # a list; hashes mean nothing to a reader
                names = "; ".join(each.partition(": Expected '")[0] for each in found)
                said = f"{bundle} is not what {signature} signs: {' '.join(names.split())[:_SAID]}"
                raise ArtifactError("signature-differs", said, remedy=_NEW_COPY) from error
            raise
