#!/bin/bash
# PID 1 of a guest whose root is the host's, read-only: what must be written lies on tmpfs. NAME, ADDRESS, PYTHON and
# AGENT come from the kernel's command line.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
for folder in /run /mnt /media /var/lib/nfs; do mount -t tmpfs tmpfs $folder; done
mkdir -p /dev/pts /dev/shm /run/lock /run/rpcbind /run/kernel/lib/modules /var/lib/nfs/v4recovery
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -s /usr/lib/uml/modules/* /run/kernel/lib/modules/
hostname "$NAME" # before any mount: NFSv4 takes two clients of one name for one
ip link set lo up
[ -n "$ADDRESS" ] && ip addr add "$ADDRESS/24" dev eth0 && ip link set eth0 up
$PYTHON -IS "$AGENT" # until the console closes; then init ends, the kernel panics, and nothing is left of the guest
