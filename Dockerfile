# The commands of the package in a container.
#
#   CPU   docker build -t dinov2_custom .
#   CUDA  docker build -t dinov2_custom --build-arg PIP_EXTRA_INDEX_URL= .
#
#   docker run --rm --gpus all --shm-size 8g -v /my/images:/images:ro -v "$PWD/out:/work/out" dinov2_custom \
#     train --config-file /opt/dinov2_custom/configs/vits.yaml --output-dir out train.dataset_path=/images
#
# torch's wheels contain CUDA's libraries, so the base image needs none: the driver comes from the NVIDIA container toolkit
# of the host. BASE may be any other image that has Python >= 3.10 and pip, for example one with a CUDA compiler.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# read by pip; a version with +cpu is higher than the same version without, so the wheels of this index are preferred
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG EXTRAS=fast,plots,export,tensorboard
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

WORKDIR /opt/dinov2_custom
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[${EXTRAS}]" \
    && python -m dinov2_custom --help

WORKDIR /work
ENTRYPOINT ["python", "-m", "dinov2_custom"]
CMD ["--help"]
