# The project with its environment, for the coordinator and the workers of compose.yaml.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /resgrid
COPY . .
RUN git config --system --add safe.directory /resgrid && make install
ENV PATH=/resgrid/.venv/bin:$PATH
