"""Whether a certificate and its key can be used.

Keeps no state; reads the two files. Callable from any thread.
"""

from __future__ import annotations

import ssl

from slurmgate.model import TlsSpec


def tls_problem(tls: TlsSpec) -> str | None:
    """Say what is wrong with the files, the field first; None when a server can use them.

    They may be exchanged at any time: that they are good now says nothing of tomorrow.
    """
    for field, file in (("certificate", tls.certificate), ("key", tls.key)):
        try:
            text = file.read_bytes()
        except OSError as error:
            return f"gate.tls.{field}: cannot read {file}: {error.strerror}"
        if b"-----BEGIN " not in text:
            return f"gate.tls.{field}: {file} is not in PEM format"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The password is for a key that has one: without it OpenSSL would ask on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password="-")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"gate.tls.key: {tls.key} does not belong to {tls.certificate}"
        return f"gate.tls.key: {tls.key} with {tls.certificate} cannot be used: {_words(error)}"
    except OSError as error:
        return f"gate.tls: cannot read {tls.certificate} and {tls.key}: {error.strerror}"
    return None


def _words(error: ssl.SSLError) -> str:
    if error.reason in ("BAD_DECRYPT", "BAD_PASSWORD_READ"):
        return "the key is encrypted, and nobody is there to type its password"
    return (error.reason or str(error)).replace("_", " ").lower()
