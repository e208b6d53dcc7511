# infer-align on vLLM's GPU image: docker build -t infer-align . && docker run --gpus all --ipc host -p 8000:8000 infer-align
FROM vllm/vllm-openai:v0.32.0

WORKDIR /opt/infer-align
COPY pyproject.toml README.md LICENSE ./
COPY infer_align infer_align
COPY kernels kernels
COPY server server
COPY clients/python clients/python
COPY clients/web clients/web
# vLLM, torch and transformers are the image's own: nothing of them is resolved again. The second line has what the extras
# store and otel need.
RUN pip install --no-cache-dir --no-deps . && pip install --no-cache-dir rich httptools httpx2 \
        alembic asyncpg 'sqlalchemy[asyncio]' opentelemetry-sdk opentelemetry-exporter-otlp-proto-http

EXPOSE 8000
ENTRYPOINT ["infer-align"]
CMD ["serve", "infer_align/demo/vllm.toml", "--set", "server.host=0.0.0.0"]
