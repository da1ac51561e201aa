"""Imports that a server makes once, so that the processes forked from it need not."""

import gc

import alembic.command
import alembic.migration
import alembic.script  # noqa: F401
import optuna.storages._rdb.storage
import peft  # noqa: F401
import sqlalchemy.dialects.sqlite
import sqlalchemy.orm  # noqa: F401

import zofo.cli.train
import zofo.run.train
import zofo.study.worker  # noqa: F401

optuna.storages._rdb.storage.models.BaseModel  # noqa: B018  (imported on first use)
# `Trainer.train` collects garbage. Without the freeze it would visit every imported object.
gc.freeze()
