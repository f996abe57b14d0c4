"""What the registry knows about this plugin. Imports no torch."""

from commhub import HookSpec, hookimpl


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="noop",
            summary="Send nothing: ranks drift apart; shows what free communication would give.",
            factory="commhub_noop._hook:Noop",
            exact=False,
            agrees=False,
            sent_bytes="0",
            reference="https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html",
        )
    ]
