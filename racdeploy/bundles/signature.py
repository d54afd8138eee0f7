"""Signatures over all files of a bundle, in the OpenSSF model signing format.

A signature lists every file of the folder with its hash, including those that the manifest does not
name, so added files are detected like changed ones. The verifier must state the expected signer: a
public key, or an identity that sigstore has recorded.
Source: OpenSSF model signing 1.0; model-signing 1.1. Only this module imports model-signing.
"""

from __future__ import annotations

import ast
import base64
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.bundles.hub.layout import explain_bad_name
from racdeploy.errors import ArtifactError, EnvironmentFailure, UsageError
from racdeploy.files.reading import artifact_errors, read_bytes
from racdeploy.files.writing import write_atomic
from racdeploy.manifest import Manifest
from racdeploy.plugins import require_package
from racdeploy.runtime.loading import refuse_unlisted

SIGNATURE_NAME = "model.sig"
_MAX_BYTES = 4_000_000
_MAX_MESSAGE = 300
# Files of a git working copy. racdeploy reads none of them, so they are not signed.
_GIT = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
_NEW_COPY = "get bundle and signature again from their source; do not use this copy"
_PUBLIC_KEY = "openssl ec -in key.pem -pubout -out key.pub makes the public one of a private key"
_PRIVATE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem makes one"


@dataclass(frozen=True)
class Signer:
    """Expected signer of a bundle: a public key, or an identity with the issuer that confirms it.

    Args:
        public_key: PEM file; None to check the identity.
        identity: e-mail address or workflow, as in the sigstore certificate.
        issuer: OpenID provider of the identity.
    """

    public_key: Path | None = None
    identity: str = ""
    issuer: str = ""

    def __str__(self) -> str:
        return str(self.public_key) if self.public_key else f"{self.identity} of {self.issuer}"


def sign(bundle: Path, signature: Path | None = None, key: Path | None = None) -> Path:
    """Check a bundle against its manifest and sign all its files; return the signature's path.

    Args:
        signature: file to write; None is :data:`SIGNATURE_NAME` in the bundle.
        key: PEM file of a private key on P-256, P-384 or P-521; None signs through sigstore with
            the identity of this CI job or of the user who logs in, recorded in a public log.

    Raises:
        ArtifactError: the bundle is damaged, or has a file name that cannot be published.
        UsageError: the key cannot sign.
        EnvironmentFailure: sigstore cannot be reached, or refuses the request.
    """
    require_package("model_signing")
    require_package("OpenSSL")
    manifest = Manifest.read(bundle)
    manifest.check_files(bundle)
    refuse_unlisted(bundle, manifest)

    path = signature or bundle / SIGNATURE_NAME
    if path.is_dir():
        raise UsageError(
            "signature-is-folder", f"{path} is a folder", remedy="name a file with --signature"
        )
    for name in _list_files(bundle):
        if reason := explain_bad_name(name):
            raise ArtifactError(
                "name-not-publishable",
                f"{bundle / name} would be signed and not pushed: its name {reason}",
                remedy="remove or rename it first",
            )

    # Sign into a temporary file: a signer that fails must not leave half a signature.
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / SIGNATURE_NAME
        with nullcontext() if key else _reaching_sigstore():
            config = _open_signer(key).set_hashing_config(_make_hashing_config(bundle, path))
            config.sign(bundle.resolve(), written)
        write_atomic(path, written.read_bytes())
    return path


def check_signature(bundle: Path, signature: Path, signer: Signer) -> None:
    """Compare every file of a bundle with its signature; call it before any file is used.

    Raises:
        ArtifactError: a file was changed, added or removed; or the signature is by another signer,
            damaged or incomplete.
        UsageError: the public key cannot be used.
        EnvironmentFailure: sigstore's trust roots cannot be downloaded.
    """
    require_package("model_signing")
    require_package("OpenSSL")
    if not bundle.is_dir():
        raise ArtifactError("no-such-folder", f"there is no folder {bundle}")
    if not signature.is_file():
        raise ArtifactError(
            "no-signature",
            f"there is no signature {signature}",
            remedy="name it with --signature; racdeploy sign makes one",
        )

    content = read_bytes(signature, _MAX_BYTES)
    for _ in _list_files(bundle):
        pass  # raises for links and devices before anything is hashed
    config = _open_verifier(signer).set_hashing_config(_make_hashing_config(bundle, signature))

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / SIGNATURE_NAME  # verify the bytes that were read, not a later file
        copy.write_bytes(content)
        with _explaining(bundle, signature, signer), redirect_stdout(sys.stderr):
            config.verify(bundle.resolve(), copy)  # the user may name the bundle by a link

    # The content is authentic now, but its signer may have excluded files of the bundle.
    with artifact_errors(signature, _NEW_COPY):
        statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))
        made = statement.get("predicate", {}).get("serialization", {})
        unsigned = {str(name) for name in made.get("ignore_paths", [])}
    if others := unsigned - _GIT - _list_signatures(bundle, signature):
        raise ArtifactError(
            "signature-incomplete",
            f"{signature} omits files of {bundle}: {', '.join(sorted(others))[:_MAX_MESSAGE]}",
            remedy="ask for a signature over the whole folder: racdeploy sign",
        )


def _list_files(bundle: Path) -> Iterator[str]:
    """Yield the paths of signed files; raise ArtifactError for anything but files and folders."""
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                "link-in-bundle",
                f"{path} is a link or a device; only regular files can be signed",
                remedy="copy the bundle again, as files",
            )
        if path.is_file() and name.partition("/")[0] not in _GIT:
            yield name


def _list_signatures(bundle: Path, signature: Path) -> set[str]:
    """Return paths of signatures in the bundle: a signature cannot cover itself."""
    path, folder = signature.resolve(), bundle.resolve()
    inside = {path.relative_to(folder).as_posix()} if path.is_relative_to(folder) else set()
    return {SIGNATURE_NAME, *inside}


def _make_hashing_config(bundle: Path, signature: Path) -> Any:
    """Return the configuration that hashes every file except signatures and git's files."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=sorted(_list_signatures(bundle, signature)))


def _open_signer(key: Path | None) -> Any:
    from model_signing import signing

    config = signing.Config()
    if key is None:
        return config.use_sigstore_signer(use_ambient_credentials=True)

    content = _read_key(key)
    try:
        with artifact_errors(key):
            return config.use_elliptic_key_signer(private_key=key)
    except ArtifactError as error:
        kind = "an encrypted private key" if b"ENCRYPTED" in content else "no private key"
        raise UsageError(
            "signing-key-unusable", f"{key} is {kind} on P-256, P-384 or P-521", remedy=_PRIVATE_KEY
        ) from error


def _open_verifier(signer: Signer) -> Any:
    from model_signing import verifying

    config = verifying.Config()
    if signer.public_key is None:
        with _reaching_sigstore():
            return config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.issuer)

    _read_key(signer.public_key)
    try:
        with artifact_errors(signer.public_key):
            return config.use_elliptic_key_verifier(public_key=signer.public_key)
    except ArtifactError as error:
        raise UsageError(
            "signing-key-unusable",
            f"{signer.public_key} is no public key on P-256, P-384 or P-521",
            remedy=_PUBLIC_KEY,
        ) from error


def _read_key(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError("no-signing-key", f"there is no key {file}", remedy=_PRIVATE_KEY)
    return read_bytes(file)


@contextmanager
def _reaching_sigstore() -> Iterator[None]:
    """Convert errors of sigstore's client into EnvironmentFailure."""
    try:
        with artifact_errors("what sigstore answers"):
            yield
    except (ArtifactError, OSError) as error:  # those of the network are OSErrors
        cause = " ".join(str(error.__cause__ or error).split())[:_MAX_MESSAGE]
        raise EnvironmentFailure(
            "sigstore-failed",
            f"sigstore cannot be used: {cause}",
            remedy="it needs the network, and in a workflow the permission id-token: write; a key "
            "needs neither: --key, or --public-key",
        ) from error


@contextmanager
def _explaining(bundle: Path, signature: Path, signer: Signer) -> Iterator[None]:
    """Convert errors of model-signing about a signature into an ArtifactError of one line."""
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import VerificationError

    other = ArtifactError(
        "signed-by-another", f"{signature} was not made by {signer}", remedy=_NEW_COPY
    )
    with artifact_errors(signature, _NEW_COPY):
        try:
            yield
        except (InvalidSignature, VerificationError) as error:
            raise other from error
        except ValueError as error:
            kind, _, differences = str(error).partition(": ")
            if kind == "Key mismatch":
                raise other from error
            if kind == "Signature mismatch":
                changes = ast.literal_eval(differences)  # a list; omit the hashes
                names = "; ".join(each.partition(": Expected '")[0] for each in changes)
                raise ArtifactError(
                    "signature-differs",
                    f"{bundle} differs from {signature}: {' '.join(names.split())[:_MAX_MESSAGE]}",
                    remedy=_NEW_COPY,
                ) from error
            raise
