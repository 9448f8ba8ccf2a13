"""The twin: GET /api/servers/{id} as the documentation of FastAPI, PyJWT, SQLAlchemy (async ORM) and pydantic teaches.

It does less than the controller: the token is only decoded (no look whether its session still exists), there is no
rate limit, no request id and no log line.

    DATABASE=/path/twin.db SECRET=… uvicorn bench.peers.twin:app    # after: python -m bench.peers.twin, which fills it
"""

# mypy: ignore-errors
from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SECRET = os.environ["SECRET"]
SERVERS = 100

engine = create_async_engine(f"sqlite+aiosqlite:///{os.environ['DATABASE']}")
sessions = async_sessionmaker(engine, expire_on_commit=False)
bearer = HTTPBearer()
app = FastAPI()


@event.listens_for(engine.sync_engine, "connect")
def _wal(connection, _record):
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


class Base(DeclarativeBase):
    pass


class ServerRow(Base):
    __tablename__ = "servers"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    country: Mapped[str]
    ip: Mapped[str]
    status: Mapped[str]
    load: Mapped[int]


class Server(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    country: str
    ip: str
    status: str
    load: int


async def session() -> AsyncIterator[AsyncSession]:
    async with sessions() as opened:
        yield opened


async def account(credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> str:
    try:
        return str(jwt.decode(credentials.credentials, SECRET, algorithms=["HS256"])["sub"])
    except jwt.PyJWTError as error:
        raise HTTPException(401, "invalid token") from error


@app.get("/api/servers/{server_id}")
async def get_server(
    server_id: str, _account: Annotated[str, Depends(account)], opened: Annotated[AsyncSession, Depends(session)]
) -> Server:
    row = await opened.get(ServerRow, server_id)
    if row is None:
        raise HTTPException(404, "no such server")
    return Server.model_validate(row)


async def _fill() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    rows = [
        ServerRow(
            id=str(uuid.uuid4()),
            name=f"node-{number}",
            country="Germany",
            ip=f"192.0.2.{number}",
            status="online",
            load=17,
        )
        for number in range(SERVERS)
    ]
    async with sessions() as opened:
        opened.add_all(rows)
        await opened.commit()
    claims = {"sub": str(uuid.uuid4()), "exp": datetime.now(UTC) + timedelta(hours=1)}
    print(rows[SERVERS // 2].id, jwt.encode(claims, SECRET, "HS256"))


if __name__ == "__main__":
    sys.exit(asyncio.run(_fill()))
