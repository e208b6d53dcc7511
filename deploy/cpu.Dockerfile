# infer-align with the embedded engine, for CPUs, gateways and tests:
# docker build --file deploy/cpu.Dockerfile --tag infer-align:cpu .
FROM python:3.11-slim

WORKDIR /opt/infer-align
COPY pyproject.toml constraints.txt README.md LICENSE MANIFEST.in ./
COPY infer_align infer_align
COPY kernels kernels
COPY server server
COPY clients/python clients/python
COPY clients/web clients/web
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        --constraint constraints.txt '.[local,store,otel]' \
    && useradd --create-home --uid 10001 infer-align

USER infer-align
EXPOSE 8000
ENTRYPOINT ["infer-align"]
CMD ["serve", "--set", "server.host=0.0.0.0"]
