{{- define "nemo.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "nemo.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "nemo.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "nemo.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "nemo.selectorLabels" -}}
app.kubernetes.io/name: {{ include "nemo.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nemo.labels" -}}
{{ include "nemo.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "nemo.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "nemo.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "nemo.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{- define "nemo.isHub" -}}
{{- if hasPrefix "hf://" .Values.model.name -}}true{{- end -}}
{{- end -}}

{{- define "nemo.downloads" -}}
{{- if and (include "nemo.isHub" .) .Values.model.download -}}true{{- end -}}
{{- end -}}

{{- define "nemo.scales" -}}
{{- if or .Values.autoscaling.enabled .Values.keda.enabled -}}true{{- end -}}
{{- end -}}

{{- /* The claim of a StatefulSet is made by it, one a replica. */ -}}
{{- define "nemo.claimPerReplica" -}}
{{- if and .Values.statefulSet.enabled .Values.persistence.enabled (not .Values.persistence.existingClaim) -}}true{{- end -}}
{{- end -}}

{{- define "nemo.storeReadOnly" -}}
{{- if and .Values.nfs.enabled .Values.nfs.readOnly -}}true{{- end -}}
{{- end -}}

{{- /* What the schema cannot say: values that contradict each other. */ -}}
{{- define "nemo.validate" -}}
{{- $stores := 0 -}}
{{- range list .Values.persistence.enabled .Values.hostPath.enabled .Values.nfs.enabled -}}
{{- if . -}}{{- $stores = add $stores 1 -}}{{- end -}}
{{- end -}}
{{- if gt (int $stores) 1 -}}
{{- fail "persistence, hostPath, nfs: enable at most one of them as the model store" -}}
{{- end -}}
{{- if and .Values.nfs.enabled (not .Values.nfs.server) -}}
{{- fail "nfs.server: must be given when nfs.enabled" -}}
{{- end -}}
{{- if and (include "nemo.downloads" .) (include "nemo.storeReadOnly" .) -}}
{{- fail "nfs.readOnly: cannot be true while model.download fills the store" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}
{{- fail "autoscaling.enabled, keda.enabled: enable one of them; KEDA makes a HorizontalPodAutoscaler of its own" -}}
{{- end -}}
{{- range $name := list "autoscaling" "keda" -}}
{{- $scaler := get $.Values $name -}}
{{- if gt (int $scaler.minReplicas) (int $scaler.maxReplicas) -}}
{{- fail (printf "%s.minReplicas: must be at most maxReplicas = %d, got %d" $name (int $scaler.maxReplicas) (int $scaler.minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.persistence.accessMode "ReadWriteOncePod") .Values.persistence.enabled (not .Values.statefulSet.enabled) (or (gt (int .Values.replicaCount) 1) (include "nemo.scales" .)) -}}
{{- fail "persistence.accessMode: ReadWriteOncePod serves one pod; several replicas of a Deployment need ReadWriteMany, or statefulSet.enabled" -}}
{{- end -}}
{{- if and (eq (int .Values.updateStrategy.maxSurge) 0) (eq (int .Values.updateStrategy.maxUnavailable) 0) -}}
{{- fail "updateStrategy: maxSurge and maxUnavailable must not both be 0" -}}
{{- end -}}
{{- range $name := list "grpc" "openai" -}}
{{- $tls := get $.Values.tls $name -}}
{{- if and $tls.enabled (not $tls.secretName) -}}
{{- fail (printf "tls.%s.secretName: must name a Secret of type kubernetes.io/tls when tls.%s.enabled" $name $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.grpc.enabled .Values.openai.enabled -}}
{{- fail "tls.grpc.enabled: the OpenAI gateway speaks gRPC without TLS to the server beside it; set openai.enabled = false" -}}
{{- end -}}
{{- range $name := list "httpRoute" "grpcRoute" -}}
{{- $route := get $.Values $name -}}
{{- if and $route.enabled (not $route.parentRefs) -}}
{{- fail (printf "%s.parentRefs: must name a Gateway when %s.enabled" $name $name) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.openai.enabled -}}
{{- if .Values.httpRoute.enabled -}}
{{- fail "httpRoute.enabled: leads to the OpenAI gateway, which openai.enabled = false leaves out" -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- range .Values.ingress.hosts -}}{{- range .paths -}}
{{- if eq .port "openai" -}}
{{- fail "ingress.hosts: a path leads to port openai, which openai.enabled = false leaves out" -}}
{{- end -}}
{{- end -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled (ne .Values.service.type "ClusterIP") -}}
{{- fail (printf "metrics.serviceMonitor.enabled: a Service of type %s does not carry the metrics port; use metrics.podMonitor" .Values.service.type) -}}
{{- end -}}
{{- $ports := dict -}}
{{- range list .Values.service.httpPort .Values.service.grpcPort .Values.service.metricsPort .Values.openai.port -}}
{{- $_ := set $ports (toString .) true -}}
{{- end -}}
{{- if lt (len $ports) 4 -}}
{{- fail "service.httpPort, service.grpcPort, service.metricsPort, openai.port: must differ" -}}
{{- end -}}
{{- end -}}

{{- /* The gateway's own metrics; its page has the engine's, too, which are read from the server already. */ -}}
{{- define "nemo.gatewayEndpoint" -}}
{{- if .root.Values.openai.enabled -}}
- port: openai
  path: /v1/metrics
  interval: {{ .interval }}
  {{- if .root.Values.tls.openai.enabled }}
  scheme: https
  tlsConfig: {insecureSkipVerify: true}  # the certificate is for the name clients use, and Prometheus comes by address
  {{- end }}
  metricRelabelings:
    - {sourceLabels: [__name__], regex: nemo_gateway_.*, action: keep}
{{- end -}}
{{- end -}}
