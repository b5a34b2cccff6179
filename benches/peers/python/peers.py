"""What src/contender/python.rs runs: one library, one kind of work, for some time.

Prints how many operations were done, how many per second were measured, and their times in seconds, sorted.
"""

import asyncio
import os
import random
import sys
import time

LIBRARY, WORK = sys.argv[1:3]
TASKS, CONNECTIONS = map(int, sys.argv[3:5])
WARM_UP, SECONDS = map(float, sys.argv[5:7])
ITEMS, TELLERS, ACCOUNTS, BRANCHES = map(int, sys.argv[7:11])
SQL = sys.argv[11:]
URL = os.environ["PEERS_URL"]


def parameters():
    aid, tid, bid = (random.randint(1, n) for n in (ACCOUNTS, TELLERS, BRANCHES))
    delta = random.randint(-5000, 5000)
    return [(delta, aid), (aid,), (delta, tid), (delta, bid), (tid, bid, aid, delta)]


async def asyncpg_operation():
    import asyncpg

    pool = await asyncpg.create_pool(URL, min_size=CONNECTIONS, max_size=CONNECTIONS)

    async def read():
        async with pool.acquire() as connection:
            assert await connection.fetchval(SQL[0], random.randint(1, ITEMS)) is not None

    async def update():
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(SQL[1], 1, random.randint(1, ITEMS))

    async def tpcb():
        async with pool.acquire() as connection, connection.transaction():
            for sql, values in zip(SQL, parameters()):
                await connection.fetch(sql, *values)

    return {"read": read, "update": update, "tpcb": tpcb}[WORK]


async def sqlalchemy_operation():
    import re

    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    url = URL.replace("postgres://", "postgresql+asyncpg://")
    engine = create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_timeout=60)
    statements = [text(re.sub(r"\$(\d)", r":p\1", sql)) for sql in SQL]

    def named(values):
        return {f"p{i}": value for i, value in enumerate(values, 1)}

    async def read():
        async with engine.connect() as connection:
            result = await connection.execute(statements[0], named([random.randint(1, ITEMS)]))
            assert result.scalar_one() is not None

    async def update():
        async with engine.begin() as connection:
            await connection.execute(statements[1], named([1, random.randint(1, ITEMS)]))

    async def tpcb():
        async with engine.begin() as connection:
            for statement, values in zip(statements, parameters()):
                await connection.execute(statement, named(values))

    return {"read": read, "update": update, "tpcb": tpcb}[WORK]


async def main():
    operation = await {"asyncpg": asyncpg_operation, "sqlalchemy": sqlalchemy_operation}[LIBRARY]()
    measured_from = time.perf_counter() + WARM_UP
    end = measured_from + SECONDS
    done, times, finished = 0, [], measured_from

    async def task():
        nonlocal done, finished
        own, begun = 0, time.perf_counter()
        while begun < end or not own:
            await operation()
            now = time.perf_counter()
            done += 1
            if begun >= measured_from:
                own += 1
                times.append(now - begun)
                finished = max(finished, now)
            begun = now

    await asyncio.gather(*(task() for _ in range(TASKS)))
    print(done, len(times) / (finished - measured_from), *sorted(times))


asyncio.run(main())
