# An image of lab, whose entry point is Python:
#
#   docker build -t lab:cuda .                                                     CUDA
#   docker build -t lab:cpu --build-arg INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm lab:cpu train.py --dataset digits
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/runs" lab:cuda train.py --output-dir /runs
#
# NEVER BUILT. hadolint checks it (docs/clusters.md).
FROM python:3.12-slim

# Of torch and torchvision. The wheels on PyPI contain CUDA's libraries; the host needs the driver.
ARG INDEX=https://pypi.org/simple

# Torch first: it changes less often than lab, so that its layer is built once.
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" --index-url "$INDEX"

WORKDIR /lab
COPY . .
RUN pip install --no-cache-dir .

# Runs belong in a volume: what is written to the container is lost with it.
RUN useradd --create-home --uid 1000 lab && mkdir /runs && chown lab /runs /lab
USER 1000
VOLUME /runs

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
