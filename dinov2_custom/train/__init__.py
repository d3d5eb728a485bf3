"""Training, under upstream's names; each is imported on first use so that ``--help`` does not wait for torch."""


def __getattr__(name: str):
    if name == "get_args_parser":
        from dinov2_custom.cli import train_parser

        return train_parser
    if name == "main":
        from dinov2_custom.train.train import main

        return main
    if name == "SSLMetaArch":
        from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

        return SSLMetaArch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["SSLMetaArch", "get_args_parser", "main"]
