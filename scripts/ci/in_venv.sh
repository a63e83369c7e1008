#!/usr/bin/env bash
# Run a command with the project's environment first on the path, so that hooks work with .venv or conda alike.
exec env PATH="$(git rev-parse --show-toplevel)/.venv/bin:$PATH" "$@"
