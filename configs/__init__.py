"""YAML that runs: ``onpolicy ls`` lists it, ``onpolicy cp NAME DEST`` copies it, ``-c NAME`` uses it."""

if not __name__.startswith("lightning_onpolicy."):  # found through the repository root: a second copy of us
    raise ImportError(
        f"import this as lightning_onpolicy.{__name__}: set PYTHONSAFEPATH=1 or leave the repository."
    )
