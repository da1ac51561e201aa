"""What processes that are forked from a server need not import again."""

import gc

import alembic.command
import alembic.migration
import alembic.script  # noqa: F401
import optuna.storages._rdb.storage
import sqlalchemy.dialects.sqlite
import sqlalchemy.orm  # noqa: F401

import zofo.study.worker  # noqa: F401

optuna.storages._rdb.storage.models.BaseModel  # noqa: B018  (imported on first use)
gc.freeze()  # `Trainer.train` collects garbage, and would visit all that was imported
